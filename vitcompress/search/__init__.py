"""Search for the plan that reaches a target.

target        reaches a ratio, a size or a drop
model         what a search works on, and what it chooses
options       every way of making a part of some blocks smaller
sensitivity   what one option costs, built into the teacher alone
measure       measures all options and lists the choices between them
allocate      the cheapest choices within a budget, exactly
candidates    plans within a budget, and the same with more even widths
build         builds the students of candidates and measures how well they start
"""
