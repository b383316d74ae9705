"""Values that no step of a stream changes: made once, and read in every step.

A network that is applied with `mutable=['once']` leaves them in the collection `once`, stacked over
layers as parameters are; applied with that collection, it reads them and the layers that make them
do not run. Without the collection nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn

COLLECTION = 'once'


def once(module: nn.Module, name: str, make: Callable):
    """`make()`, or what the collection holds of it under this name."""
    if module.has_variable(COLLECTION, name):
        return module.get_variable(COLLECTION, name)
    value = make()
    if module.is_mutable_collection(COLLECTION) and not module.is_initializing():
        module.put_variable(COLLECTION, name, value)
    return value
