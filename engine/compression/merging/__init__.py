"""Merge methods: one file each, named in `registry.MERGE`."""
