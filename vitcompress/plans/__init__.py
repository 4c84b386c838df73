"""What is shared with what, what are the layers made of, and what is left?  No weights are read.

deit_base, --share 4:                    blocks  0 1 2 3 │ 4 5 6 7 │ 8 9 10 11
                                         donor   ^         ^         ^
deit_base, --share 4 --pattern cycle:    groups  0 1 2 0 1 2 0 1 2 0 1 2
"""
