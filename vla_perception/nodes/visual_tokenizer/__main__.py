"""`python -m vla_perception.nodes.visual_tokenizer`."""

from vla_perception.nodes import executables

executables.visual_tokenizer()
