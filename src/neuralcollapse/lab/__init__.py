"""Experiments: data, backbones, training, run folders, figures. Needs the extra ``lab`` of the package."""
