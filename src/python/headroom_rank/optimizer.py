"""An optimizer of the user's own: made, stepped, saved and loaded."""

import inspect
import json

from . import failure, user
from .failure import UserFailure

_KEY = "python.optimizer"


def find(place):
    """The user's function or class."""
    try:
        return user.find(place)
    except Exception as error:
        raise failure.failed(f"{_KEY} {place}", error) from None


def _make(function, arguments, net, rate, weight_decay):
    import torch

    is_class = inspect.isclass(function) and issubclass(function, torch.optim.Optimizer)
    known = user.parameters_of(function)
    for name, value in {"lr" if is_class else "learning_rate": rate, "weight_decay": weight_decay}.items():
        if name in known:
            arguments.setdefault(name, value)
    if is_class:
        return function([value for value in net.parameters() if value.requires_grad], **arguments)
    return function(net, **arguments)


def _refused(made):
    """Why this optimizer cannot be used; None: it can."""
    lacking = [name for name in ("param_groups", "step", "state_dict", "load_state_dict") if not hasattr(made, name)]
    if lacking:
        return f"gives a {type(made).__name__} without {lacking[0]}: expected an optimizer of torch.optim"
    closure = inspect.signature(made.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        return f"gives a {type(made).__name__}, which runs passes by itself (step(closure)): a step has its gradients already"
    if callable(getattr(made, "train", None)) and callable(getattr(made, "eval", None)):
        return (
            f"gives a {type(made).__name__}, which keeps other weights for evaluation than for training (train(), eval()): "
            "evaluations and checkpoints would have the wrong ones"
        )
    return None


class Optimizer:
    """Its rates are those that the user gave, times the schedule's rate over `train.learning_rate`."""

    def __init__(self, function, arguments, net, rate, weight_decay):
        try:
            self.inner = _make(function, arguments, net, rate, weight_decay)
        except Exception as error:
            raise failure.failed(_KEY, error) from None
        problem = _refused(self.inner)
        if problem:
            raise UserFailure(f"{_KEY} {problem}")
        names = {id(value): name for name, value in net.named_parameters() if value.requires_grad}
        self.parameters = [value for group in self.inner.param_groups for value in group["params"]]
        if any(id(value) not in names for value in self.parameters):
            raise UserFailure(f"{_KEY} has a parameter that is no trainable parameter of the model")
        self.names = [names[id(value)] for value in self.parameters]
        self.rate, self.stepped = rate, False
        self.firsts = [None if group.get("lr") is None else float(group["lr"]) for group in self.inner.param_groups]

    @property
    def kind(self):
        return f"{type(self.inner).__module__}.{type(self.inner).__qualname__}"

    def _set_rates(self, rate):
        for group, first in zip(self.inner.param_groups, self.firsts):
            if first is None:
                continue
            value = rate if first == self.rate or not self.rate else first * (rate / self.rate)
            if hasattr(group["lr"], "fill_"):
                group["lr"].fill_(value)
            else:
                group["lr"] = value

    def _places(self):
        return [(value.data_ptr(), None if value.grad is None else value.grad.data_ptr()) for value in self.parameters]

    def step(self, rate):
        places = None if self.stepped else self._places()
        try:
            self._set_rates(rate)
            self.inner.step()
        except Exception as error:
            raise failure.failed(_KEY, error) from None
        if places is not None:
            self._check(places)
            self.stepped = True

    def _check(self, before):
        """Parameters and gradients are views of the trainer's tensors, and must stay so."""
        for name, old, new in zip(self.names, before, self._places()):
            if old != new:
                what = "the parameter" if old[0] != new[0] else "the gradient of"
                raise UserFailure(
                    f"{_KEY}: step() of {self.kind} puts another tensor in the place of {what} {name}: it must change parameters "
                    "in place, and leave gradients where they are (no zero_grad)"
                )

    def state(self):
        """`(structure, [(name, tensor), ...])`: the `state_dict` as JSON, in which tensors are named."""
        tensors = {}

        def name_of(path):
            if path[0] == "state" and len(path) > 2 and isinstance(path[1], int) and path[1] < len(self.names):
                path = path[2:] + (self.names[path[1]],)
            name = ".".join(map(str, path))
            while name in tensors:
                name += "_"
            return name

        def walk(value, path):
            if hasattr(value, "data_ptr"):
                name = name_of(path)
                tensors[name] = value.detach()
                return {"tensor": name}
            if isinstance(value, dict):
                return {"dict": [[walk(key, path), walk(part, path + (key,))] for key, part in value.items()]}
            if isinstance(value, (list, tuple)):
                kind = "list" if isinstance(value, list) else "tuple"
                return {kind: [walk(part, path + (place,)) for place, part in enumerate(value)]}
            if value is None or type(value) in (bool, int, float, str):
                return value
            raise UserFailure(
                f"{_KEY}: the state_dict of {self.kind} holds a thing of type {type(value).__name__} at {'.'.join(map(str, path))}: a checkpoint "
                "holds tensors, numbers, texts, and lists and dicts of them"
            )

        try:
            state = self.inner.state_dict()
        except Exception as error:
            raise failure.failed(f"{_KEY}, state_dict", error) from None
        structure = {"kind": self.kind, "parameters": self.names, "state": walk(state, ())}
        return json.dumps(structure), list(tensors.items())

    def load(self, text, tensors):
        """Takes over what `state` gave. The user's rates stay."""
        told = json.loads(text)
        if told["kind"] != self.kind:
            raise UserFailure(f"is that of {told['kind']}, and {_KEY} makes a {self.kind}")
        if told["parameters"] != self.names:
            raise UserFailure(f"is of other parameters, or of the same in another order, than {_KEY} has now")

        def walk(value):
            if not isinstance(value, dict):
                return value
            (kind, inner), = value.items()
            if kind == "tensor":
                return tensors[inner]
            if kind == "dict":
                return {walk(key): walk(part) for key, part in inner}
            return (list if kind == "list" else tuple)(map(walk, inner))

        try:
            self.inner.load_state_dict(walk(told["state"]))
        except Exception as error:
            raise failure.failed(f"{_KEY}, load_state_dict", error) from None
