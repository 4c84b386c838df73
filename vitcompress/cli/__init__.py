"""What can be typed, and how a command ends."""
