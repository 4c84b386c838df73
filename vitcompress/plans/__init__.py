"""Plans: which blocks share what, what their layers consist of, and the resulting sizes.

Planning reads no weights.

deit_base, --share 4:                    blocks  0 1 2 3 │ 4 5 6 7 │ 8 9 10 11
                                         donor   ^         ^         ^
deit_base, --share 4 --pattern cycle:    groups  0 1 2 0 1 2 0 1 2 0 1 2
"""
