"""Images and labels: opening what `--data` names, views of images, and data loaders.

DIR               a folder: class folders, a flat folder, or both split as train/ and val/
wds:SHARDS        tar shards in WebDataset's layout: a folder, x-{000..099}.tar, or URLs
hfds:DIR          parquet or arrow files in Hugging Face's layout, or the output of `save_to_disk`
torch/NAME:DIR    a data set that torchvision knows by name
built-in          the images of a built-in model; for other models, crops of built-in photographs
"""
