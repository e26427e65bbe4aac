"""Classes by which transformers saves and loads a model with an insertion, one for each class that is served.

``insert`` gives the model the class ``TokenLearner…`` of its own class, which is derived from it, and a config of its
own with the model type ``tokenlearner_…`` and the insertion as ``token_learner``. So ``save_pretrained`` writes down
what is needed, ``from_pretrained`` of that class or of an auto class does the insertion again, and a transformers that
knows nothing of it says that it doesn't know the model type, instead of loading half of the model.

What is saved has to be the model the insertion was made into: a model around it, such as a ``CLIPModel`` around its
``vision_model``, has a config that knows nothing of it, and loads without it (transformers then lists the learner's
parameters as unexpected).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, AutoModelForVideoClassification
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from tokenlearner.errors import InputError
from tokenlearner.insertion.spec import Insertion

CONFIGS: dict[type[PreTrainedConfig], type[PreTrainedConfig]] = {}
"""For each config class of transformers that of a model with an insertion."""
MODELS: dict[type[nn.Module], type[nn.Module]] = {}
"""For each model class of transformers that of a model with an insertion."""

_KEPT = "_kept_insertion"


class WithTokenLearner:
    """What a ``TokenLearner…`` class has over the class of transformers it is derived from.

    Args:
        config: As the class takes it; with ``config.token_learner`` set, that is inserted.
    """

    config: Any

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        config = _with_class(copy.deepcopy(config), CONFIGS)
        values, config.token_learner = config.token_learner, None
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        if values is not None:
            _insert_again(self, values)

    @property
    def token_learner_insertion(self) -> Insertion | None:
        """What is inserted. The config has it too, to be saved with it."""
        return self.__dict__.get(_KEPT)

    @token_learner_insertion.setter
    def token_learner_insertion(self, spec: Insertion) -> None:
        from tokenlearner.insertion.huggingface import HuggingFaceViT

        HuggingFaceViT(_module(self)).settle(spec)
        self.__dict__[_KEPT] = spec
        self.config.token_learner = spec.to_dict()

    @token_learner_insertion.deleter
    def token_learner_insertion(self) -> None:
        from tokenlearner.insertion.huggingface import HuggingFaceViT

        if _KEPT not in self.__dict__:  # as after any attribute's removal
            raise AttributeError(_KEPT)
        del self.__dict__[_KEPT]
        HuggingFaceViT(_module(self)).unsettle()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers, but always under the parameters' present names.

        The older names of a checkpoint are found by the model type, and this one has none.
        """
        super().save_pretrained(*args, **{**kwargs, "save_original_format": False})  # type: ignore[misc]


def take_class(model: Any) -> None:
    """Gives the model the class and config of one with an insertion; other models with the same config keep theirs."""
    model.__class__ = MODELS[type(model)]
    _take_config(model, CONFIGS)
    model.config.token_learner = None


def give_class_back(model: Any) -> None:
    """Undoes :func:`take_class`."""
    del model.config.token_learner
    _take_config(model, {ours: theirs for theirs, ours in CONFIGS.items()})
    model.__class__ = next(theirs for theirs, ours in MODELS.items() if ours is type(model))


def register(model_class: type, auto: str | None, module: str) -> list[type]:
    """Makes the class for ``model_class``, and its config's, and makes transformers' auto classes find it.

    Returns what it made, for ``module`` to keep under its name, where pickle looks for it.

    Args:
        model_class: A class of transformers.
        auto: ``"model"``, ``"image"`` or ``"video"`` for the auto class that is to find it; None for none.
        module: The name of the module that keeps the classes.
    """
    theirs: Any = model_class
    config_class = theirs.config_class
    made: list[Any] = []
    if config_class not in CONFIGS:
        CONFIGS[config_class] = _new_config_class(config_class, module)
        made.append(CONFIGS[config_class])
        AutoConfig.register(made[0].model_type, made[0])
    body = {"__module__": module, "config_class": CONFIGS[config_class], "__doc__": None}
    ours: Any = type(f"TokenLearner{model_class.__name__}", (WithTokenLearner, model_class), body)
    MODELS[model_class] = ours
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(ours), ours._can_record_outputs)  # else only a constructor tells it
    if auto is not None:
        autos: dict[str, Any] = {
            "model": AutoModel,
            "image": AutoModelForImageClassification,
            "video": AutoModelForVideoClassification,
        }
        before = autos[auto]._model_mapping._extra_content.get(CONFIGS[config_class])
        autos[auto].register(CONFIGS[config_class], ours if before is None else (before, ours), exist_ok=True)
    return [*made, ours]


def _new_config_class(config_class: Any, module: str) -> Any:
    body = {
        "__module__": module,
        "__annotations__": {"token_learner": "dict | None"},
        "token_learner": None,
        "model_type": f"tokenlearner_{config_class.model_type}",
    }
    return type(f"TokenLearner{config_class.__name__}", (config_class,), body)


def _take_config(model: nn.Module, classes: Mapping[type[PreTrainedConfig], type[PreTrainedConfig]]) -> None:
    """Replaces the config by a copy of another class, everywhere in the model where the same one is read."""
    memo: dict[int, Any] = {}
    config: Any = copy.deepcopy(model.config, memo)
    _with_class(config, classes)
    for module in model.modules():
        old = vars(module).get("config")
        if old is not None and id(old) in memo:
            module.config = memo[id(old)]


def _with_class(config: Any, classes: Mapping[type[PreTrainedConfig], type[PreTrainedConfig]]) -> Any:
    if type(config) in classes:
        config.__class__ = classes[type(config)]
    return config


def _insert_again(model: Any, values: Mapping[str, Any]) -> None:
    from tokenlearner.insertion.elastic import insert_again
    from tokenlearner.insertion.huggingface import HuggingFaceViT

    try:
        spec = Insertion(**values)
    except TypeError as error:
        raise InputError(f"{type(model.config).__name__}: token_learner is not understood: {error}") from error
    depth = len(HuggingFaceViT(model).layers())
    if depth != spec.host_depth:
        raise InputError(
            f"{type(model.config).__name__}: token_learner was made for a host of {spec.host_depth} layers, but "
            f"this one has {depth}"
        )
    insert_again(model, spec)


def _module(model: Any) -> nn.Module:
    return model
