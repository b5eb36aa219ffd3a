"""The models and the diffusion of task `cell` as a PyTorch user would write them: what `src/task/cell` must equal.

Run as a program it writes tests/fixtures/cell_golden.safetensors: weights, inputs, outputs, losses of every variant, samples, and 50
steps of training with buffers and averages. Names in `state_dict()` are those of published checkpoints. Names of fixtures:
`<case>/param/<name>` before, `<case>/after/<name>` after training, `<case>/ema/<name>`, others by what they are.
"""

import copy
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


# Models


class Encoder(nn.Module):
    def __init__(self, genes, latent, hidden):
        super().__init__()
        sizes = [genes, *hidden]
        self.network = nn.ModuleList(
            nn.Sequential(nn.Dropout(0.0), nn.Linear(i, o), nn.BatchNorm1d(o), nn.PReLU()) for i, o in zip(sizes, hidden)
        )
        self.network.append(nn.Linear(hidden[-1], latent))

    def forward(self, x):
        for layer in self.network:
            x = layer(x)
        return F.normalize(x, p=2, dim=1)


class Decoder(nn.Module):
    def __init__(self, genes, latent, hidden):
        super().__init__()
        self.network = nn.ModuleList([nn.Sequential(nn.Linear(latent, hidden[0]), nn.BatchNorm1d(hidden[0]), nn.PReLU())])
        for i, o in zip(hidden, hidden[1:]):
            self.network.append(nn.Sequential(nn.Dropout(0.0), nn.Linear(i, o), nn.BatchNorm1d(o), nn.PReLU()))
        self.network.append(nn.Linear(hidden[-1], genes))

    def forward(self, x):
        for layer in self.network:
            x = layer(x)
        return x


class Autoencoder(nn.Module):
    def __init__(self, genes, latent=128, hidden=(1024, 1024, 1024)):
        super().__init__()
        self.encoder = Encoder(genes, latent, list(hidden))
        self.decoder = Decoder(genes, latent, list(reversed(hidden)))

    def forward(self, x):
        return self.decoder(self.encoder(x))


def time_features(t, width, longest=10_000.0):
    """Cosines, then sines; f32 throughout. Odd widths end with a zero."""
    half = width // 2
    frequency = torch.exp(-math.log(longest) * torch.arange(half, dtype=torch.float32) / max(half, 1))
    angle = t[:, None].float() * frequency[None]
    return F.pad(torch.cat([angle.cos(), angle.sin()], dim=1), (0, width % 2))


def time_mlp(width):
    return nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))


class TimeEmbedding(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.width, self.time_embed = width, time_mlp(width)

    def forward(self, t):
        return self.time_embed(time_features(t, self.width))


class Block(nn.Module):
    def __init__(self, inputs, outputs, width):
        super().__init__()
        self.fc = nn.Linear(inputs, outputs)
        self.norm = nn.LayerNorm(outputs)
        self.emb_layer = nn.Sequential(nn.SiLU(), nn.Linear(width, outputs))

    def forward(self, x, time):
        return F.silu(self.norm(self.fc(x) + self.emb_layer(time)))


class CellUnet(nn.Module):
    def __init__(self, latent, hidden, outputs=None):
        super().__init__()
        width, head = hidden[0], 2 * hidden[1]
        steps = list(zip(hidden, hidden[1:]))
        self.time_embedding = TimeEmbedding(width)
        self.layers = nn.ModuleList(Block(i, o, width) for i, o in [(latent, width), *steps])
        self.reverse_layers = nn.ModuleList(Block(i, o, width) for o, i in reversed(steps))
        self.out1, self.norm_out = nn.Linear(width, head), nn.LayerNorm(head)
        self.out2 = nn.Linear(head, outputs or latent)

    def forward(self, x, t):
        time = self.time_embedding(t)
        seen = []
        for layer in self.layers:
            x = layer(x, time)
            seen.append(x)
        for layer, skip in zip(self.reverse_layers, reversed(seen[:-1])):
            x = layer(x, time) + skip
        return self.out2(F.silu(self.norm_out(self.out1(x))))


class Classifier(nn.Module):
    def __init__(self, latent, hidden, classes):
        super().__init__()
        a, b, c = hidden
        self.width, self.time_embed = a, time_mlp(a)
        self.fc1, self.fc2, self.fc3 = nn.Linear(latent, a), nn.Linear(a, b), nn.Linear(b, c)
        # The third is in published files and in no forward pass.
        self.emb_layers1, self.emb_layers2, self.emb_layers3 = (
            nn.Sequential(nn.SiLU(), nn.Linear(a, o)) for o in (a, b, c)
        )
        self.norm1, self.norm2, self.norm3 = nn.BatchNorm1d(a), nn.BatchNorm1d(b), nn.BatchNorm1d(c)
        self.out = nn.Linear(c, classes)

    def forward(self, x, t):
        time = self.time_embed(time_features(t, self.width))
        x = F.silu(self.norm1(self.fc1(x) + self.emb_layers1(time)))
        x = F.silu(self.norm2(self.fc2(x) + self.emb_layers2(time)))
        return self.out(F.silu(self.norm3(self.fc3(x))))


# Diffusion


def beta_schedule(kind, steps):
    if kind == "linear":
        return np.linspace(0.1 / steps, 20 / steps, steps, dtype=np.float64)
    bar = lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.array([min(1 - bar((i + 1) / steps) / bar(i / steps), 0.999) for i in range(steps)])


def kept_steps(steps, text):
    if not text:
        return list(range(steps))
    if text.startswith("ddim"):
        wanted = int(text[4:])
        return next(list(range(0, steps, k)) for k in range(1, steps) if len(range(0, steps, k)) == wanted)
    counts, kept, start = [int(part) for part in text.split(",")], [], 0
    for index, count in enumerate(counts):
        size = steps // len(counts) + (index < steps % len(counts))
        stride, place = (size - 1) / (count - 1) if count > 1 else 1.0, 0.0
        for _ in range(count):
            kept.append(start + round(place))
            place += stride
        start += size
    return kept


class Diffusion:
    def __init__(self, steps=1000, schedule="linear", respacing="", predict_xstart=False, learn_sigma=False, sigma_small=False,
                 use_kl=False, rescale_timesteps=False, rescale_learned_sigmas=False):
        self.xstart, self.learned, self.kl = predict_xstart, learn_sigma, use_kl
        self.rescale, self.rescale_sigmas, self.all = rescale_timesteps, rescale_learned_sigmas, steps
        self.kept = kept_steps(steps, respacing)
        base = np.cumprod(1 - beta_schedule(schedule, steps))[self.kept]
        self.betas = 1 - base / np.append(1.0, base[:-1])
        self.bar = np.cumprod(1 - self.betas)
        self.before = np.append(1.0, self.bar[:-1])
        self.posterior = self.betas * (1 - self.before) / (1 - self.bar)
        self.posterior_log = np.log(np.append(self.posterior[1], self.posterior[1:]))
        if sigma_small:
            self.fixed, self.fixed_log = self.posterior, self.posterior_log
        else:
            self.fixed = np.append(self.posterior[1], self.betas[1:])
            self.fixed_log = np.log(self.fixed)
        self.steps = len(self.kept)

    @staticmethod
    def at(values, t):
        return torch.from_numpy(np.asarray(values))[t].float()[:, None]

    def time(self, t):
        place = torch.tensor(self.kept)[t]
        return place.float() * (1000.0 / self.all) if self.rescale else place

    def noised(self, x0, t, noise):
        return self.at(np.sqrt(self.bar), t) * x0 + self.at(np.sqrt(1 - self.bar), t) * noise

    def posterior_mean(self, x0, x, t):
        share0 = self.betas * np.sqrt(self.before) / (1 - self.bar)
        share = (1 - self.before) * np.sqrt(1 - self.betas) / (1 - self.bar)
        return self.at(share0, t) * x0 + self.at(share, t) * x

    def x0_of_noise(self, x, t, noise):
        return self.at(np.sqrt(1 / self.bar), t) * x - self.at(np.sqrt(1 / self.bar - 1), t) * noise

    def noise_of_x0(self, x, t, x0):
        return (self.at(np.sqrt(1 / self.bar), t) * x - x0) / self.at(np.sqrt(1 / self.bar - 1), t)

    def predict(self, output, x, t, clip):
        if self.learned:
            output, v = output.chunk(2, dim=1)
            share = (v + 1) / 2
            log = share * self.at(np.log(self.betas), t) + (1 - share) * self.at(self.posterior_log, t)
            variance = log.exp()
        else:
            variance, log = self.at(self.fixed, t).expand_as(x), self.at(self.fixed_log, t).expand_as(x)
        x0 = output if self.xstart else self.x0_of_noise(x, t, output)
        if clip:
            x0 = x0.clamp(-1, 1)
        return self.posterior_mean(x0, x, t), variance, log, x0

    def bound(self, output, x0, x, t, clip=False):
        mean, _, log, _ = self.predict(output, x, t, clip)
        kl = normal_kl(self.posterior_mean(x0, x, t), self.at(self.posterior_log, t), mean, log).mean(1) / math.log(2)
        first = -bin_log_likelihood(x0, mean, 0.5 * log).mean(1) / math.log(2)
        return torch.where(t == 0, first, kl)

    def losses(self, network, x0, t, noise):
        x = self.noised(x0, t, noise)
        output = network(x, self.time(t))
        if self.kl:
            vb = self.bound(output, x0, x, t)
            return {"loss": vb * self.steps, "vb": vb}
        target = x0 if self.xstart else noise
        if not self.learned:
            mse = ((target - output) ** 2).mean(1)
            return {"loss": mse, "mse": mse}
        mean, v = output.chunk(2, dim=1)
        mse = ((target - mean) ** 2).mean(1)
        vb = self.bound(torch.cat([mean.detach(), v], 1), x0, x, t)
        if self.rescale_sigmas:
            vb = vb * self.steps / 1000
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def sample(self, network, x, start, noise, guide=None, guide_below=0, clip=False, eta=None):
        with torch.no_grad():
            for step in reversed(range(start)):
                t = torch.full((len(x),), step)
                time = self.time(t)
                mean, variance, log, x0 = self.predict(network(x, time), x, t, clip)
                fresh = noise[step] if step else torch.zeros_like(x)
                if eta is None:
                    if guide and self.kept[step] < guide_below:
                        mean = mean + variance * guide(x, time)
                    x = mean + (0.5 * log).exp() * fresh
                    continue
                bar, before = self.at(self.bar, t), self.at(self.before, t)
                if guide:
                    x0 = self.x0_of_noise(x, t, self.noise_of_x0(x, t, x0) - (1 - bar).sqrt() * guide(x, time))
                e = self.noise_of_x0(x, t, x0)
                sigma = eta * ((1 - before) / (1 - bar)).sqrt() * (1 - bar / before).sqrt()
                x = x0 * before.sqrt() + (1 - before - sigma**2).sqrt() * e + sigma * fresh
        return x

    def bits(self, network, x0, noise):
        last = torch.full((len(x0),), self.steps - 1)
        mean, log = self.at(np.sqrt(self.bar), last) * x0, self.at(np.log(1 - self.bar), last)
        zero = torch.zeros(1)
        total = normal_kl(mean, log, zero, zero).mean(1) / math.log(2)
        with torch.no_grad():
            for step in range(self.steps):
                t = torch.full((len(x0),), step)
                x = self.noised(x0, t, noise[step])
                total = total + self.bound(network(x, self.time(t)), x0, x, t)
        return total


def normal_kl(mean, log, mean2, log2):
    return 0.5 * (-1 + log2 - log + (log - log2).exp() + (mean - mean2) ** 2 * (-log2).exp())


def cdf(x):
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def bin_log_likelihood(x, mean, log_scale):
    centred, inverse = x - mean, (-log_scale).exp()
    upper, lower = cdf(inverse * (centred + 1 / 255)), cdf(inverse * (centred - 1 / 255))
    log = lambda mass: mass.clamp(min=1e-12).log()
    return torch.where(x < -0.999, log(upper), torch.where(x > 0.999, log(1 - lower), log(upper - lower)))


# Fixtures

LATENT, HIDDEN, BATCH, STEPS = 6, [12, 8, 6, 4], 5, 50

# Keys of `Diffusion` per variant of the loss.
VARIANTS = {
    "eps": dict(),
    "xstart": dict(predict_xstart=True),
    "cosine": dict(schedule="cosine"),
    "kl": dict(use_kl=True),
    "kl_small_xstart": dict(use_kl=True, sigma_small=True, predict_xstart=True),
    "learned": dict(learn_sigma=True),
    "learned_rescaled": dict(learn_sigma=True, rescale_learned_sigmas=True, respacing="250", rescale_timesteps=True),
    "learned_kl": dict(learn_sigma=True, use_kl=True, respacing="10,15,20", schedule="cosine"),
    "learned_xstart": dict(learn_sigma=True, predict_xstart=True, respacing="ddim50"),
}


def shaken(model):
    """Moves every parameter off its default, so that no two layers are alike."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def state(model, case, kind):
    return {f"{case}/{kind}/{key}": value.detach().clone() for key, value in model.state_dict().items()}


def train(model, loss_of, lr, decay, ema, cancelled=()):
    """50 AdamW steps; the loss of each, and the average of the parameters with the buffers as they are.

    `cancelled`: layers before a batch norm, whose biases have no gradient but rounding errors. AdamW makes whole steps of those:
    they are set to 0, as Headroom's are.
    """
    for name in cancelled:
        model.get_parameter(f"{name}.bias").register_hook(torch.zeros_like)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay)
    shadow = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses = []
    model.train()
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        for name, parameter in model.named_parameters():
            shadow[name].mul_(ema).add_(parameter.detach(), alpha=1 - ema)
    model.eval()
    return torch.stack(losses), {**dict(model.named_buffers()), **shadow}


def before_norms(autoencoder):
    """Linear layers of an autoencoder that a batch norm follows."""
    names = dict(autoencoder.named_modules())
    following = lambda name: f"{name[: name.rfind('.')]}.{int(name[name.rfind('.') + 1 :]) + 1}"
    linear = [name for name, module in names.items() if isinstance(module, nn.Linear)]
    return [name for name in linear if isinstance(names.get(following(name)), nn.BatchNorm1d)]


def autoencoder_case(out):
    torch.manual_seed(1)
    case, genes = "autoencoder", 20
    model = shaken(Autoencoder(genes, LATENT, [9, 8, 7]))
    out.update(state(model, case, "param"))
    x = torch.rand(STEPS, BATCH, genes).mul(6).sub(3).clamp(min=0)
    out[f"{case}/x"] = x
    model.eval()
    out[f"{case}/latent"], out[f"{case}/decoded"] = model.encoder(x[0]).detach(), model(x[0]).detach()
    model.train()
    out[f"{case}/decoded_train"] = copy.deepcopy(model)(x[0]).detach()
    out[f"{case}/losses"], averages = train(model, lambda m, s: F.mse_loss(m(x[s]), x[s]), 5e-3, 0.01, 0.9, before_norms(model))
    out.update(state(model, case, "after"))
    out.update({f"{case}/ema/{key}": value for key, value in averages.items()})
    out[f"{case}/decoded_after"] = model(x[0]).detach()


def diffusion_cases(out):
    torch.manual_seed(2)
    model = shaken(CellUnet(LATENT, HIDDEN))
    wide = shaken(CellUnet(LATENT, HIDDEN, 2 * LATENT))
    out.update(state(model, "unet", "param"))
    out.update(state(wide, "wide", "param"))
    x0 = F.normalize(torch.randn(STEPS, BATCH, LATENT), dim=2)
    # Beyond ±0.999 the first bin is open.
    x0[0, 0, 0], x0[0, 1, 1] = 1.0, -1.0
    noise, u = torch.randn(STEPS, BATCH, LATENT), torch.rand(STEPS, BATCH, dtype=torch.float64)
    out.update({"diffusion/x0": x0, "diffusion/noise": noise, "diffusion/u": u})
    out["unet/output"] = model(x0[0], torch.tensor([0, 1, 57, 500, 999])).detach()
    for name, keys in VARIANTS.items():
        diffusion = Diffusion(**keys)
        network = wide if keys.get("learn_sigma") else model
        # The first two samples are at the first step: its term of the bound is another one.
        t = (u[0] * diffusion.steps).long()
        t[:2] = 0
        terms = diffusion.losses(network, x0[0], t, noise[0])
        out.update({f"losses/{name}/{key}": value.detach() for key, value in terms.items()})
        network.zero_grad()
        terms["loss"].mean().backward()
        gradients = [parameter.grad.flatten() for parameter in network.parameters()]
        out[f"losses/{name}/gradient_norm"] = torch.cat(gradients).norm()
        out[f"losses/{name}/gradient_out2"] = network.out2.bias.grad.clone()
        network.zero_grad()
    steps = Diffusion(respacing="ddim20")
    out["losses/bits"] = steps.bits(model, x0[0], noise)
    for name, network, keys in [("unet", model, {}), ("wide", wide, VARIANTS["learned_rescaled"])]:
        diffusion = Diffusion(**keys)

        def loss_of(m, s):
            t = (u[s] * diffusion.steps).long()
            return diffusion.losses(m, x0[s], t, noise[s])["loss"].mean()

        out[f"{name}/losses"], averages = train(network, loss_of, 1e-3, 1e-4, 0.9)
        out.update(state(network, name, "after"))
        out.update({f"{name}/ema/{key}": value for key, value in averages.items()})
    return model, x0, noise, u


def classifier_case(out, unet, x0, noise, u):
    torch.manual_seed(3)
    case, classes = "classifier", 3
    model = shaken(Classifier(LATENT, [10, 8, 6], classes))
    out.update(state(model, case, "param"))
    y = torch.randint(classes, (STEPS, BATCH))
    out[f"{case}/y"] = y
    diffusion = Diffusion()
    t = lambda s: (u[s] * 500).long()
    noised = lambda s: diffusion.noised(x0[s], t(s), noise[s])
    model.eval()
    out[f"{case}/logits"] = model(noised(0), t(0)).detach()
    loss_of = lambda m, s: F.cross_entropy(m(noised(s), t(s)), y[s])
    out[f"{case}/losses"], averages = train(
        model, loss_of, 3e-3, 0.0, 0.9, ["fc1", "fc2", "fc3", "emb_layers1.1", "emb_layers2.1"]
    )
    out.update(state(model, case, "after"))
    out.update({f"{case}/ema/{key}": value for key, value in averages.items()})

    def guide(x, time):
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            log = F.log_softmax(model(x, time), dim=-1)
            return torch.autograd.grad(log[range(len(x)), y[0]].sum(), x)[0] * 2.0

    out[f"{case}/gradient"] = guide(x0[0], t(0))
    # Weights as training left them.
    start = noise[0]
    walks = {
        "ancestral": (Diffusion(respacing="20"), dict()),
        "ancestral_clipped": (Diffusion(respacing="20"), dict(clip=True)),
        "ancestral_guided": (Diffusion(respacing="20"), dict(clip=True, guide=guide, guide_below=500)),
        "ancestral_small": (Diffusion(respacing="20", sigma_small=True), dict()),
        "ddim": (Diffusion(respacing="ddim20"), dict(eta=0.0)),
        "ddim_noisy": (Diffusion(respacing="ddim20"), dict(eta=0.7)),
        "ddim_guided": (Diffusion(respacing="ddim20"), dict(eta=0.0, clip=True, guide=guide)),
    }
    for name, (process, keys) in walks.items():
        out[f"samples/{name}"] = process.sample(unet, start, process.steps, noise, **keys)
    process = Diffusion(respacing="ddim20")
    out["samples/interpolated"] = process.sample(unet, process.noised(x0[1], torch.full((BATCH,), 11), noise[0]), 12, noise)


def main():
    from safetensors.torch import save_file

    out = {}
    autoencoder_case(out)
    classifier_case(out, *diffusion_cases(out))
    path = Path(__file__).resolve().parents[2] / "fixtures" / "cell_golden.safetensors"
    save_file({key: value.clone().contiguous() for key, value in out.items()}, path)
    print(path.name, path.stat().st_size, "bytes,", len(out), "tensors")


if __name__ == "__main__":
    main()
