"""Profiles: what some methods must know of a model before they serve it, measured once by `winnow calibrate`.

A method that needs one has a line in `registry.CALIBRATED` and a calibrator, which watches the model read prompts.
Profiles are kept by the hash of the model's weights (`store`); the engine loads those that exist when it starts and
tells the server which, so that a request for any other is refused by the name of the command that makes it.
"""
