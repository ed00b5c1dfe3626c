"""The part of the model that a parameter belongs to: backbone, embedding or experts."""

from typing import Literal

Part = Literal["backbone", "embedding", "experts"]


def parameter_part(name: str) -> Part:
    """Return the part of the parameter with this dotted name."""
    components = name.split(".")
    if "experts" in components or "hidden_experts" in components:  # MoLE beside the blocks, MoE inside them
        return "experts"
    return "embedding" if "embedding" in components else "backbone"
