"""Pretrained models: resolve a name, build the model, load its weights.

ModelRecipe ── resolve ──► Source ── build ──► model without weights ── load ──► model with weights
"""
