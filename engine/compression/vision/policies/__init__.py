"""Vision policies: one file each, named in `vision.registry.VISION`."""
