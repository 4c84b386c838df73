"""What is shared with what, what are the layers made of, and what is left?  No weights are read.

deit_base, --share 4:                    blocks  0 1 2 3 │ 4 5 6 7 │ 8 9 10 11
                                         donor   ^         ^         ^
deit_base, --share 4 --pattern cycle:    groups  0 1 2 0 1 2 0 1 2 0 1 2
"""

from vitcompress.plans.make import layer_shapes, make_plan, measured_on, plan_of, weighed
from vitcompress.plans.model import Group, Plan, Size
from vitcompress.plans.sizes import group_params

__all__ = ["Group", "Plan", "Size", "group_params", "layer_shapes", "make_plan", "measured_on", "plan_of", "weighed"]
