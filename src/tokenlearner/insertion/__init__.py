"""TokenLearner inside hosts we did not write."""

from tokenlearner.insertion.elastic import set_num_tokens
from tokenlearner.insertion.insert import (
    attention_maps,
    insert,
    inserted_parameters,
    insertion_of,
    learners,
    remove,
)
from tokenlearner.insertion.saving import Preprocessing, load, save
from tokenlearner.insertion.spec import Insertion

__all__ = [
    "Insertion",
    "Preprocessing",
    "attention_maps",
    "insert",
    "inserted_parameters",
    "insertion_of",
    "learners",
    "load",
    "remove",
    "save",
    "set_num_tokens",
]
