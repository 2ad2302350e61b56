"""Sets the labels of our docstrings (Shapes and dtypes, Units, ...) in paragraphs of their own."""

import re

import griffe

LABELS = "Shapes and dtypes|Units|Sharding|Gradient|Implementations|Errors|Source|Attributes[^:\n]*"


class Labels(griffe.Extension):
    def on_instance(self, *, obj, **_):
        if obj.docstring:
            obj.docstring.value = re.sub(rf"(?m)^({LABELS}): ", r"\n**\1.** ", obj.docstring.value)
