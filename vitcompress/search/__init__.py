"""Search for the plan that reaches a target.

target        reaches a ratio, a size or a drop
model         what a search works on, and what it chooses
options       every way of making a part of some blocks smaller
measure       measures what all options cost
context       a student that is cut throughout, in which costs are measured
changes       what options change in the layers
evidence      what changes cost, all at once
progress      keeps the state of a measurement that is interrupted
measured      the options with their costs, and the choices between them
saved         keeps measured options in a file
allocate      the cheapest choices within a budget, exactly
candidates    the best plans within a budget
frontier      the best plans for many budgets
student       builds the student of a plan with its starting weights
build         builds the students of candidates and measures how well they start
"""
