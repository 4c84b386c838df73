"""Closed-form starts: shared matrices, factors and narrow layers, fitted to calibration images.

start             sets the starting weights of a student
inputs            records what layers receive and return while a model runs
importance        how much each token counts in a fit
align             reorders and rotates the blocks of a group so that they become more alike
shared_matrices   whole matrices that blocks share
factors           factors of groups of several blocks, with the shared matrices they are added to
blockwise         narrow blocks and factors of single blocks, fitted in the order in which they run
layer_scale       what multiplies the output of a part of a block
narrow            the layers of a narrow block: neurons to keep, heads to cut
regression        least squares on second moments
"""
