"""The user's model and data sets, as Headroom's loop asks for them."""

import base64
import json
import os
import sys

from . import failure, optimizer, sample, server, user

_KNOWN = ("model", "loss", "train", "val", "test", "predict", "transform", "collate", "metrics")
_SPLITS = ("train", "val", "test", "predict")


class Session:
    """What the user's function gave. Made before a rank forks its workers, and before ranks are forked."""

    def __init__(self, section):
        self.section = section
        self.seed = int(section.get("seed", 0))
        for folder in reversed(section.get("path") or ["."]):
            sys.path.insert(0, os.path.abspath(folder))
        self.built = self._build()
        get = self.built.get
        self.transform, self.loss, self.collate = get("transform"), get("loss"), get("collate")
        self.metrics = dict(get("metrics") or {})
        self.names = [name for name in _SPLITS if get(name) is not None]
        self.datasets = [get(name) for name in self.names]
        self._server = self.net = self.call = self.structure = None
        self.training = self.optimizer = None
        self.buffers = []
        # A module that is missing is found out before anything starts, and read once for all ranks.
        self.own = optimizer.find(section["optimizer"]) if section.get("optimizer") else None

    def _build(self):
        place = self.section["build"]
        if not place:
            raise failure.Refused("python.build names no function: give one as module:function, such as mypkg.train:build")
        try:
            function = user.find(place)
            arguments = dict(self.section.get("args") or {})
            if "data" not in arguments and "data" in user.parameters_of(function):
                arguments["data"] = self.section.get("data")
            built = function(**arguments)
        except Exception as error:
            raise failure.failed(f"python.build {place}", error) from None
        if not isinstance(built, dict):
            built = {key: getattr(built, key) for key in _KNOWN if hasattr(built, key)}
        unknown = sorted(set(built) - set(_KNOWN))
        problem = None
        if unknown:
            problem = f"gives {', '.join(unknown)}: expected {', '.join(_KNOWN)}"
        elif not callable(built.get("model")):
            problem = "gives no model: expected a function without arguments that makes an nn.Module"
        for key in ("train", "val"):
            if problem is None and not hasattr(built.get(key), "__getitem__"):
                problem = f"gives no {key}: expected a data set with __len__ and __getitem__"
        if problem is None and not all(map(callable, (built.get("metrics") or {}).values())):
            problem = "gives metrics that are no functions: expected name: function(prediction, *fields) -> (sum, count)"
        if problem:
            raise failure.UserFailure(f"python.build {place} {problem}")
        return built

    def serve_workers(self):
        """Starts the process that forks decode workers; before this one has a second thread."""
        if self._server is None:
            self._server = server.Server(self)

    # From here on: what the loop asks.

    def facts(self):
        """Names and lengths of the data sets, and names of the metrics, as JSON."""
        try:
            splits = [[name, len(dataset)] for name, dataset in zip(self.names, self.datasets)]
        except Exception as error:
            raise failure.failed("len() of a data set", error) from None
        return json.dumps({"splits": splits, "metrics": list(self.metrics), "transforms": self.transform is not None})

    def worker(self, old):
        return self._server.worker(old)

    def use_structure(self, text):
        """The structure of samples, as a worker found it."""
        self.structure = json.loads(text)
        self.template = base64.b64decode(self.structure[1]) if self.structure[0] == "b" else None

    def _fields(self, tensors):
        """The batch as the user's code wants it."""
        if self.template is None:
            return sample.put_together(self.structure, tensors)
        values, offsets = tensors
        device, ends = values.device, offsets.tolist()
        data = values.cpu()
        samples = []
        for first, end in zip(ends, ends[1:]):
            # A plan's measurement has made-up bytes.
            found = sample.unpack(sample.raw_bytes(data[first:end]))
            samples.append(sample.unpack(bytearray(self.template)) if found is None else found)
        try:
            batch = self.collate(samples)
        except Exception as error:
            raise failure.failed("collate", error) from None
        structure, leaves = sample.take_apart(batch)
        return sample.put_together(structure, [value.to(device) for _, value in leaves])

    def model(self, seed, device):
        """Makes the model, once; `(name, tensor, trained)` of its parameters and buffers. Later calls move it to `device`."""
        import torch

        try:
            if self.net is None:
                torch.manual_seed(seed)
                net = self.built["model"]()
                if not isinstance(net, torch.nn.Module):
                    raise TypeError(f"model() gives a {type(net).__name__}: expected an nn.Module")
                self.net = self.call = net
                if self.section.get("compile"):
                    self.call = torch.compile(net)
            self.net.to(device)
        except Exception as error:
            raise failure.failed("model", error) from None
        kept = self.net.state_dict(keep_vars=True)
        named = [(name, value, value.requires_grad) for name, value in self.net.named_parameters()]
        places = {}
        for prefix, module in self.net.named_modules():
            for key in module._buffers:
                places[f"{prefix}.{key}" if prefix else key] = module._buffers
        self.buffers = []
        for name, value in self.net.named_buffers():
            if name in kept:
                named.append((name, value, False))
                self.buffers.append((places[name], name.rpartition(".")[2], value))
        return named

    def forward(self, tensors, train, measure):
        """`(loss, prediction, sums)` of a batch; `sums` is None unless the metrics are wanted."""
        if self.training is not train:
            self.net.train(train)
            self.training = train
        fields = self._fields(tensors)
        try:
            loss, prediction = self._pass(fields)
        except Exception as error:
            raise failure.failed("forward" if train else "forward of an evaluation", error) from None
        if train:
            self._keep_buffers()
        sums = self._measure(prediction, fields) if measure else None
        return loss, _tensor_of(prediction, loss), sums

    def backward(self, loss):
        """Gradients of a loss. PyTorch lets Python's lock go meanwhile."""
        try:
            loss.backward()
        except Exception as error:
            raise failure.failed("backward", error) from None

    def make_optimizer(self, rate, weight_decay):
        arguments = dict(self.section.get("optimizer_args") or {})
        self.optimizer = optimizer.Optimizer(self.own, arguments, self.net, rate, weight_decay)

    def step(self, rate):
        self.optimizer.step(rate)

    def optimizer_state(self):
        return self.optimizer.state()

    def load_optimizer(self, text, tensors):
        self.optimizer.load(text, dict(tensors))

    def predict(self, tensors):
        """The prediction for a batch."""
        if self.training is not False:
            self.net.train(False)
            self.training = False
        fields = self._fields(tensors)
        try:
            if self.loss is not None:
                return _tensor_of(self._called(fields, alone=True), None)
            return _tensor_of(self._pass(fields)[1], None)
        except Exception as error:
            raise failure.failed("forward of a prediction", error) from None

    def _called(self, fields, alone):
        if isinstance(fields, dict):
            return self.call(**fields)
        if not isinstance(fields, tuple):
            return self.call(fields)
        return self.call(fields[0]) if alone else self.call(*fields)

    def _pass(self, fields):
        import torch

        if self.loss is not None:
            prediction = self._called(fields, alone=True)
            rest = (fields,) if isinstance(fields, dict) else fields[1:] if isinstance(fields, tuple) else ()
            loss = self.loss(prediction, *rest)
        else:
            result = self._called(fields, alone=False)
            if isinstance(result, torch.Tensor):
                loss = prediction = result
            elif isinstance(result, dict) or hasattr(result, "loss"):
                loss = result["loss"] if isinstance(result, dict) else result.loss
                prediction = result
            else:
                loss, prediction = result[0], result[1]
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            found = f"a tensor of {list(loss.shape)}" if isinstance(loss, torch.Tensor) else f"a {type(loss).__name__}"
            raise TypeError(f"the loss is {found}: expected a tensor of one number, the mean over the batch's samples")
        return loss.reshape(()) if loss.dim() else loss, prediction

    def _keep_buffers(self):
        """Modules may put new tensors in the place of their buffers: the trainer keeps those that it knows."""
        for place, key, known in self.buffers:
            if place[key] is not known:
                known.copy_(place[key].detach())
                place[key] = known

    def _measure(self, prediction, fields):
        import torch

        arguments = fields if isinstance(fields, tuple) else (fields,)
        if hasattr(prediction, "logits") and not isinstance(prediction, torch.Tensor):
            prediction = prediction.logits
        sums = []
        with torch.no_grad():
            for name, metric in self.metrics.items():
                try:
                    part = metric(prediction, *arguments)
                    total, count = part
                    sums += [float(total), float(count)]
                except Exception as error:
                    raise failure.failed(f"metric {name}", error) from None
        return sums


def _tensor_of(prediction, loss):
    """The tensor that stands for a prediction: itself, its logits, or its first tensor."""
    import torch

    if isinstance(prediction, torch.Tensor):
        return prediction
    if isinstance(prediction, dict):
        for key in ("logits", "prediction"):
            if isinstance(prediction.get(key), torch.Tensor):
                return prediction[key]
        prediction = prediction.values()
    elif isinstance(getattr(prediction, "logits", None), torch.Tensor):
        return prediction.logits
    if isinstance(prediction, (list, tuple)) or hasattr(prediction, "__iter__"):
        for part in prediction:
            if isinstance(part, torch.Tensor) and part is not loss:
                return part
    return torch.zeros(0)
