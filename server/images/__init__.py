"""Images and videos of requests: from a URL or base64 to checked RGB pixels.

uri.py         data: URIs, strictly
addresses.py   which addresses may be fetched from
fetch.py       http(s), from domains that are allowed
decode.py      bytes to pixels
reader.py      all of that, at the cost that the settings allow
"""
