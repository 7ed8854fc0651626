"""What is wrong with an image."""

from __future__ import annotations


class BadImage(Exception):
    """An image that cannot be had or read. The message is for the caller; it quotes neither bytes nor addresses.

    `code` is one of OpenAI's: invalid_image_url, invalid_base64_image, empty_image_file, image_too_large,
    image_too_small, unsupported_image_media_type, image_parse_error, failed_to_download_image.
    """

    def __init__(self, message: str, code: str):
        super().__init__(message)
        self.code = code
