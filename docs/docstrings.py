"""Puts the labels of our docstrings (Shapes and dtypes, Units, ...) into paragraphs, and fields into a list."""

import re

import griffe

LABELS = "Shapes and dtypes|Units|Sharding|Gradient|Implementations|Errors|Source|Attributes[^:\n]*"


class Labels(griffe.Extension):
    def on_instance(self, *, obj, **_):
        if obj.docstring:
            text = re.sub(r"(?m)^([a-z_]+(?:, [a-z_]+)*): ", r"\n- `\1`: ", obj.docstring.value)
            obj.docstring.value = re.sub(rf"(?m)^({LABELS}): ", r"\n**\1.** ", text)
