"""Plant plausible mistakes in a copy of the package, one at a time: the tests must turn red for each.

``make mutants`` runs them all; ``python -m tests.mutants NAME ...`` runs some.
"""

import contextlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Mutant(NamedTuple):
    """In ``ddpm_lib/file``, ``old`` becomes ``new``; ``tests`` (of tests/test_*.py) must notice."""

    file: str
    old: str
    new: str
    tests: str
    why: str


MUTANTS = {
    # schedule.py
    "beta for beta tilde": Mutant(
        "schedule.py",
        "((1 - before) / (1 - self.alpha_bar) * self.beta)[1:]",
        "self.beta[1:]",
        "schedule",
        "the two variances of the paper mixed up",
    ),
    "alpha for alpha_bar": Mutant(
        "schedule.py",
        "self.signal = self.alpha_bar.sqrt()",
        "self.signal = self.alpha.sqrt()",
        "schedule",
        "the bar forgotten in the closed form",
    ),
    "missing root of the noise": Mutant(
        "schedule.py",
        "self.noise = (1 - self.alpha_bar).sqrt()",
        "self.noise = 1 - self.alpha_bar",
        "schedule",
        "variance taken for standard deviation",
    ),
    "missing root in one step": Mutant(
        "schedule.py",
        "+ beta.sqrt() * eps",
        "+ beta * eps",
        "schedule",
        "variance taken for standard deviation",
    ),
    "one step keeps the signal": Mutant(
        "schedule.py",
        "return (1 - beta).sqrt() * x_prev",
        "return x_prev",
        "schedule",
        "a variance that explodes: the signal must shrink",
    ),
    "cosine without offset": Mutant(
        "schedule.py",
        "/ T + s) / (1 + s) * math.pi",
        "/ T) * math.pi",
        "schedule",
        "the offset s keeps the first beta from vanishing",
    ),
    "cosine not squared": Mutant(
        "schedule.py",
        "* math.pi / 2) ** 2",
        "* math.pi / 2)",
        "schedule",
        "the curve is that of alpha_bar, a squared cosine",
    ),
    "log variance from a floor": Mutant(
        "schedule.py",
        "table[0], table[1] = math.nan, table[2]",
        "table[0], table[1] = math.nan, math.log(1e-20)",
        "schedule",
        "a floor of 1e-20 wrecks the first term of the bound",
    ),
    "posterior coefficients swapped": Mutant(
        "schedule.py",
        "return c0, ct, beta_tilde",
        "return ct, c0, beta_tilde",
        "schedule",
        "x0 and x_t in each other's place",
    ),
    "posterior without the root of alpha": Mutant(
        "schedule.py",
        "ct = math.sqrt(1 - beta) * (1 - alpha_bar_s)",
        "ct = (1 - beta) * (1 - alpha_bar_s)",
        "schedule",
        "a missing root in equation 7",
    ),
    "long steps take the beta of t": Mutant(
        "schedule.py",
        "beta = 1 - float(self.alpha_bar[t] / self.alpha_bar[s])",
        "beta = float(self.beta[t])",
        "schedule",
        "a respaced walk that keeps the betas of the full one",
    ),
    "tables in half precision": Mutant(
        "schedule.py",
        "getattr(self, table).to(like.dtype).to(like.device)",
        "(1 - self.alpha_bar.to(like)).sqrt() if table == 'noise' else getattr(self, table).to(like)",
        "schedule",
        "1 - alpha_bar formed after the cast is 0 for ten steps",
    ),
    "t = 0 let through": Mutant(
        "schedule.py",
        "def check(self, t: int | Tensor, low: int = 1)",
        "def check(self, t: int | Tensor, low: int = 0)",
        "bad_input",
        "counting from 0 goes unnoticed",
    ),
    # prediction.py
    "t off by one in the denoiser": Mutant(
        "prediction.py",
        "self.network(x_t, steps - 1, *told)",
        "self.network(x_t, steps, *told)",
        "prediction",
        "the paper's weights count steps from 0",
    ),
    "sign of v": Mutant(
        "prediction.py",
        "return self.signal * self.eps - self.noise * self.x0",
        "return self.noise * self.x0 - self.signal * self.eps",
        "prediction",
        "the velocity turned round",
    ),
    "reading v with the wrong weights": Mutant(
        "prediction.py",
        "x0, eps = signal * x_t - noise * value,",
        "x0, eps = noise * x_t - signal * value,",
        "prediction",
        "signal and noise in each other's place",
    ),
    "sign of the score": Mutant(
        "prediction.py",
        "return -self.eps / self.noise",
        "return self.eps / self.noise",
        "prediction",
        "the score points to the data, eps away from them",
    ),
    "score not divided": Mutant(
        "prediction.py",
        "return -self.eps / self.noise",
        "return -self.eps",
        "prediction",
        "the score is eps over the deviation of the noise",
    ),
    "eps not recomputed after clipping": Mutant(
        "prediction.py",
        "return replace(self, x0=x0, eps=(self.x_t - self.signal * x0) / self.noise)",
        "return replace(self, x0=x0)",
        "prediction",
        "DDIM with eta = 1 is then no longer ancestral sampling",
    ),
    # loss.py
    "loss against x0": Mutant(
        "loss.py",
        "truth = Prediction(x_t, x0, eps, guess.signal, guess.noise)",
        "truth = Prediction(x_t, eps, x0, guess.signal, guess.noise)",
        "prediction",
        "data and noise in each other's place",
    ),
    "loss not squared": Mutant("loss.py", "error.square()", "error.abs()", "prediction", "the simple loss is a square"),
    "the weight of the loss squared": Mutant(
        "loss.py",
        "(guess.signal / guess.noise).clamp",
        "(guess.signal / guess.noise).square().clamp",
        "prediction",
        "signal over noise is the root of SNR already",
    ),
    "the cap as a floor": Mutant("loss.py", "clamp(max=cap)", "clamp(min=cap)", "prediction", "a cap is a maximum"),
    "the cap forgotten": Mutant(
        "training.py",
        "partial(capped_loss, cap=weight_cap)",
        "partial(capped_loss, cap=5)",
        "training",
        "an option ignored",
    ),
    # sampling.py
    "noise at the last step": Mutant(
        "sampling.py",
        "    if s == 0:\n        return mean, 0.0\n",
        "",
        "sampling",
        "two widely read tutorials add it",
    ),
    "steps start below T": Mutant(
        "sampling.py",
        "return [(i * T + steps // 2) // steps for i in range(steps, -1, -1)]",
        "return [i * (T // steps) for i in range(steps - 1, -1, -1)] + [0]",
        "sampling",
        "'leading' spacing never sees x_T at T",
    ),
    "DDIM sigma not squared": Mutant(
        "sampling.py",
        "math.sqrt(1 - alpha_bar_s - eta**2 * beta_tilde)",
        "math.sqrt(1 - alpha_bar_s - eta * beta_tilde)",
        "sampling",
        "sigma squared stands in equation 12",
    ),
    "DDIM sigma left out": Mutant(
        "sampling.py",
        "math.sqrt(1 - alpha_bar_s - eta**2 * beta_tilde)",
        "math.sqrt(1 - alpha_bar_s)",
        "sampling",
        "noise added without making room for it",
    ),
    "sigma without root": Mutant(
        "sampling.py",
        "eta * math.sqrt(beta if",
        "eta * (beta if",
        "sampling",
        "variance taken for standard deviation",
    ),
    "variances swapped": Mutant(
        "sampling.py",
        '(beta if variance == "beta" else beta_tilde)',
        '(beta_tilde if variance == "beta" else beta)',
        "sampling",
        "the two choices in each other's place",
    ),
    "clipping without effect": Mutant(
        "sampling.py",
        "prediction = prediction.clip()",
        "prediction.clip()",
        "sampling",
        "a well-known reimplementation clips to no effect",
    ),
    "dropout while sampling": Mutant(
        "sampling.py", "part.training = False", "pass", "sampling", "samples from a mutilated network"
    ),
    "modes not given back": Mutant(
        "sampling.py", "part.training = True", "pass", "sampling", "training goes on without dropout"
    ),
    "dropout while repaint walks": Mutant(
        "inverse.py",
        "with torch.no_grad(), _evaluating(denoiser):",
        "with torch.no_grad():",
        "inverse",
        "samples from a mutilated network",
    ),
    "dropout while the bound is taken": Mutant(
        "bound.py",
        "with torch.no_grad(), _evaluating(denoiser):",
        "with torch.no_grad():",
        "bound",
        "the bound of a mutilated network",
    ),
    "a weight for each column": Mutant(
        "guidance.py",
        "weight.ndim not in (0, x_t.ndim)",
        "weight.ndim > x_t.ndim",
        "guidance",
        "eight weights for eight samples guide the eight columns of each",
    ),
    "the image beside not mirrored": Mutant(
        "training.py",
        "condition = torch.where(mirrored, condition.flip(3), condition)",
        "pass",
        "training",
        "half of the pairs do not belong together",
    ),
    "noise in the order of another memory": Mutant(
        "training.py",
        "images.contiguous().to(self.device)",
        "images.to(self.device)",
        "training",
        "the same images give another run",
    ),
    "another view of the images": Mutant(
        "training.py",
        'digest.update(getattr(conditions, "__qualname__", type(conditions).__qualname__).encode())',
        "pass",
        "training",
        "a run goes on with other conditions",
    ),
    "rounded frequencies": Mutant(
        "unet.py",
        "self.frequency.element_size() < 4",
        "False",
        "unet",
        "in half precision angles are off by radians",
    ),
    # unet.py
    "cosines before sines": Mutant(
        "unet.py", "[angle.sin(), angle.cos()]", "[angle.cos(), angle.sin()]", "unet", "other code bases do this"
    ),
    "frequencies over half": Mutant(
        "unet.py", "max(half - 1, 1)", "half", "unet", "other code bases do this: weights are not interchangeable"
    ),
    "padding left and top": Mutant(
        "unet.py", "F.pad(x, (0, 1, 0, 1))", "F.pad(x, (1, 0, 1, 0))", "unet", "shifts every level by a pixel"
    ),
    "scale of attention": Mutant(
        "unet.py", "scale = q.shape[-1] ** -0.25", "scale = q.shape[-1] ** -0.5", "unet", "q and k are both scaled"
    ),
    "softmax over queries": Mutant(
        "unet.py",
        "transpose(1, 2), dim=-1) @ v",
        "transpose(1, 2), dim=-2) @ v",
        "unet",
        "weights must sum to one over keys",
    ),
    "eps of GroupNorm": Mutant("unet.py", "EPS = 1e-6", "EPS = 1e-5", "unet", "PyTorch's default, not the paper's"),
    "no skip connection in the block": Mutant(
        "unet.py", "return self.shortcut(x) + h", "return h", "unet", "a residual block without residual"
    ),
    "embedding without activation": Mutant(
        "unet.py", "self.embedding(F.silu(embedding))", "self.embedding(embedding)", "unet", "as in the paper's code"
    ),
    "no label is class 0": Mutant(
        "unet.py",
        "torch.full((x.shape[0],), classes,",
        "torch.full((x.shape[0],), 0,",
        "unet",
        "guidance against a digit",
    ),
    "last layers not near zero": Mutant(
        "unet.py", "gain=1e-5 if near_zero else 1.0", "gain=1.0", "unet", "the paper's start"
    ),
    "attention read back as positions": Mutant(
        "unet.py",
        "self.heads(q, k, v).transpose(1, 2).reshape(x.shape)",
        "self.heads(q, k, v).reshape(x.shape)",
        "unet",
        "the shapes fit, and channels become places",
    ),
    "queries and keys exchanged": Mutant(
        "unet.py", "self.out(self.heads(q, k, v)", "self.out(self.heads(k, q, v)", "unet", "who asks and who answers"
    ),
    "doubling by interpolation": Mutant(
        "unet.py",
        'self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))',
        'self.conv(F.interpolate(x, scale_factor=2.0, mode="bilinear"))',
        "equations_unet",
        "other code bases do this",
    ),
    "label not told": Mutant(
        "unet.py",
        "embedding = embedding + self._label_embedding(condition, x)",
        "embedding = embedding + 0 * self._label_embedding(condition, x)",
        "equations_unet",
        "a network that draws any digit",
    ),
    "places not put back to pixels": Mutant(
        "unet.py",
        'return F.pixel_shuffle(self.head(F.silu(self.norm(h))), self.config["patch_size"])',
        "return self.head(F.silu(self.norm(h)))",
        "unet",
        "an image of patches",
    ),
    "pixels of a patch by columns": Mutant(
        "unet.py",
        'F.pixel_unshuffle(x, self.config["patch_size"])',
        'F.pixel_unshuffle(x.mT, self.config["patch_size"]).mT',
        "unet",
        "going in in one order and out in another",
    ),
    "x and y of the places exchanged": Mutant(
        "unet.py",
        "torch.stack([width.expand(len(height), -1), height[:, None].expand(-1, len(width))])[None]",
        "torch.stack([height[:, None].expand(-1, len(width)), width.expand(len(height), -1)])[None]",
        "unet",
        "pictures that lie on their side",
    ),
    # training.py
    "the parts of a batch added up": Mutant(
        "training.py",
        "mine.mean() / self.accumulate",
        "mine.mean()",
        "training",
        "the learning rate's meaning depends on how a batch is cut",
    ),
    "one mask of dropout for all parts": Mutant(
        "training.py",
        '_seed_everything(self.options["seed"], self.step, start)',
        '_seed_everything(self.options["seed"], self.step, 1)',
        "training",
        "parts of a batch are no longer independent",
    ),
    "NaN reaches the weights": Mutant(
        "training.py",
        "(~grad_norm.isfinite()).float()",
        "torch.zeros(())",
        "training",
        "one bad batch destroys a run",
    ),
    "mirrored upside down": Mutant(
        "training.py",
        "x0.flip(3)",
        "x0.flip(2)",
        "training",
        "height and width exchanged",
    ),
    "bytes divided by 128": Mutant(
        "data.py",
        "images / 127.5 - 1",
        "images / 128 - 1",
        "training",
        "white is not 1",
    ),
    "Adam's memory laid out anew": Mutant(
        "training.py",
        "tensor = torch.empty_like(like).copy_(tensor)",
        "tensor = tensor.contiguous()",
        "training",
        "a resumed channels_last run mixes up its moments",
    ),
    "EMA of the wrong weights": Mutant(
        "training.py",
        "torch._foreach_lerp_(self.averages, self.parameters, 1 - decay)",
        "torch._foreach_lerp_(self.parameters, self.averages, 1 - decay)",
        "training",
        "the network pulled towards its own average",
    ),
    "EMA decay swapped": Mutant(
        "training.py",
        "self.parameters, 1 - decay)",
        "self.parameters, decay)",
        "training",
        "an average that forgets at once",
    ),
    "EMA warm-up off by one": Mutant(
        "training.py",
        "(1 + self.step) / (10 + self.step)",
        "(2 + self.step) / (11 + self.step)",
        "training",
        "step counts from 0",
    ),
    "learning rate warm-up off by one": Mutant(
        "training.py",
        "return rate * (self.step + 1) / warmup",
        "return rate * self.step / warmup",
        "training",
        "a first step of 0",
    ),
    "no decay": Mutant(
        "training.py",
        "(self.step - warmup) / (end - warmup)",
        "self.step / end",
        "training",
        "the decay starts after warm-up",
    ),
    "label dropout inverted": Mutant(
        "training.py",
        '< self.options["condition_dropout"]',
        '>= self.options["condition_dropout"]',
        "training",
        "keeps a tenth",
    ),
    "gradient not clipped": Mutant(
        "training.py",
        'torch.nn.utils.clip_grad_norm_(self.parameters, self.options["clip_norm"])',
        "torch.nn.utils.get_total_norm([p.grad for p in self.parameters])",
        "training",
        "the norm is logged and nothing done about it",
    ),
    "gradients pile up": Mutant("training.py", "self.optimiser.zero_grad()", "pass", "training", "zero_grad forgotten"),
    "t starts at 0 of T": Mutant(
        "training.py",
        "torch.randint(1, self.denoiser.schedule.T + 1,",
        "torch.randint(1, self.denoiser.schedule.T,",
        "training",
        "step T never trained",
    ),
    "one epoch's order for all": Mutant(
        "training.py", "default_rng([seed, epoch])", "default_rng([seed, 0])", "training", "the epochs do not differ"
    ),
    "batches drawn with replacement": Mutant(
        "training.py", ".permutation(total)", ".integers(0, total, total)", "training", "images shown twice and never"
    ),
    "noise not keyed on the step": Mutant(
        "training.py",
        "_seed_everything(seed, step)",
        "_seed_everything(seed, 0)",
        "training",
        "the same noise at every step",
    ),
    "the caller's stream used": Mutant(
        "training.py",
        '    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):\n'
        "        _seed_everything(seed, step)\n        yield\n",
        "    _seed_everything(seed, step)\n    yield\n",
        "training",
        "training reseeds the program around it",
    ),
    "EMA not resumed": Mutant(
        "training.py",
        'self.ema.network.load_state_dict(parts["ema"])',
        "pass",
        "training",
        "an average that starts anew",
    ),
    "Adam not resumed": Mutant(
        "training.py", '"state": state})', '"state": {}})', "training", "moments that start anew"
    ),
    "step not resumed": Mutant("training.py", "        self.step = step\n", "", "training", "the schedule starts anew"),
    "a wait in every step": Mutant(
        "training.py",
        "losses.append(mine.detach())",
        "losses.append(mine.detach()), float(mine.mean())",
        "training",
        "a host sync",
    ),
    "keys with no norm": Mutant(
        "unet.py",
        "attend(self._split(q, self.norm_query), self._split(k, self.norm_key)",
        "attend(self._split(q, self.norm_query), self._split(k)",
        "unet",
        "attention that a high learning rate saturates",
    ),
    # checkpoint.py
    "8 bits with one scale for all outputs": Mutant(
        "checkpoint.py",
        "scale = (rows.abs().amax(1) / 127)",
        "scale = (rows.abs().amax().expand(len(rows)) / 127)",
        "checkpoint",
        "one large weight would take the digits of all others",
    ),
    "write in place": Mutant(
        "checkpoint.py",
        'temporary = path.with_name(f".{path.name}.tmp")',
        "temporary = path",
        "checkpoint",
        "a killed process leaves half a file",
    ),
    "not flushed to disk": Mutant(
        "checkpoint.py", "            os.fsync(file.fileno())\n", "", "checkpoint", "a rename before the data"
    ),
    "checksum not compared": Mutant(
        "checkpoint.py",
        'if header.get("sha256") != _digest(header, tensors):',
        "if False:",
        "checkpoint",
        "damage unseen",
    ),
    "checksum of names alone": Mutant(
        "checkpoint.py",
        "        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())\n",
        "",
        "checkpoint",
        "flipped bits in the weights unseen",
    ),
    "checksum without names": Mutant(
        "checkpoint.py",
        'f"\\n{name} {tensor.dtype}',
        'f"\\n{tensor.dtype}',
        "checkpoint",
        "tensors may change their names",
    ),
    "weights that are no numbers": Mutant(
        "checkpoint.py", " or not value.isfinite().all():", ":", "checkpoint", "a model that says NaN"
    ),
    "Adam's state not looked at": Mutant(
        "training.py",
        "        check_fit(self._tensors(expected), tensors, str(path))\n",
        "",
        "checkpoint",
        "a missing moment would start anew, a misshaped one break the next step",
    ),
    "pickles read": Mutant(
        "checkpoint.py",
        "    try:\n        with safe_open(",
        "    if path.suffix == '.pt':\n        torch.load(path, weights_only=False)\n    try:\n        with safe_open(",
        "checkpoint",
        "unpickling runs whatever the file says",
    ),
    # names.py, interop.py and onnx.py
    "query and key exchanged for diffusers": Mutant(
        "names.py",
        "to_q                                    q\nattention.key       to_k  ",
        "to_k                                    q\nattention.key       to_q  ",
        "interop",
        "the round trip is still exact, the function is another",
    ),
    "projections transposed for diffusers": Mutant(
        "interop.py",
        "(squeezed(value) if",
        "(squeezed(value).T if",
        "interop",
        "a linear layer's weight lies as a 1x1 convolution's does",
    ),
    "up levels of the port from the coarsest": Mutant(
        "names.py",
        'level = network.halvings - turn if side == "up" else turn',
        "level = turn",
        "released",
        "the port counts both sides from the finest level, diffusers does not",
    ),
    "variance types exchanged": Mutant(
        "interop.py",
        'VARIANCE_TYPES = {"beta": "fixed_large", "beta_tilde": "fixed_small"}',
        'VARIANCE_TYPES = {"beta": "fixed_small", "beta_tilde": "fixed_large"}',
        "interop",
        "the pipeline would draw with the other variance",
    ),
    "every cosine taken for diffusers' own": Mutant(
        "interop.py",
        "elif schedule.config == Schedule.cosine(schedule.T).config:",
        'elif schedule.config["name"] == "cosine":',
        "interop",
        "another offset or clipping gives other betas",
    ),
    "silence taken for agreement": Mutant(
        "interop.py",
        '    "flip_sin_to_cos": True,\n    "freq_shift": 0,\n',
        "",
        "interop",
        "what a file leaves out has diffusers' defaults, not ours",
    ),
    "ONNX counts steps from 0": Mutant(
        "onnx.py",
        "return self.network(x_t, t - 1, label)",
        "return self.network(x_t, t, label)",
        "onnx",
        "the file promises t in 1..T",
    ),
    # worlds.py and metrics.py
    "score of the world turned round": Mutant(
        "worlds.py",
        "(self.means - x.double()[:, None])[..., None])",
        "(x.double()[:, None] - self.means)[..., None])",
        "worlds",
        "sign of the score",
    ),
    "noised covariance without noise": Mutant(
        "worlds.py",
        "alpha_bar * self.covariances + (1 - alpha_bar) * eye",
        "alpha_bar * self.covariances",
        "worlds",
        "x_t is wider",
    ),
    "weights of the data for those given x_t": Mutant(
        "worlds.py",
        '"nk,nkd->nd", noised.responsibilities(x_t), inner',
        '"k,nkd->nd", self.weights, inner',
        "worlds",
        "the best guess must weigh components by x_t",
    ),
    "reverse law of one Gaussian": Mutant(
        "worlds.py",
        "after.responsibilities(x_t)[0].clamp(min=1e-300)",
        "self.weights",
        "worlds",
        "weights must depend on x_t",
    ),
    "Frechet distance without root": Mutant(
        "metrics.py",
        ".clamp(min=0).sqrt().sum()",
        ".clamp(min=0).sum()",
        "metrics",
        "the root of the product of covariances",
    ),
    "Frechet distance of means not squared": Mutant(
        "metrics.py",
        "(a.mean(0) - b.mean(0)).square().sum()",
        "(a.mean(0) - b.mean(0)).norm()",
        "metrics",
        "a squared distance",
    ),
    # data.py
    "digits split at another place": Mutant(
        "data.py", "TRAIN = 1347", "TRAIN = 1350", "data", "test images trained on"
    ),
    "grey levels off by one": Mutant("data.py", "/ 8 - 1,", "/ 7.5 - 1,", "data", "values beyond 1"),
    "IDX sizes in the machine's byte order": Mutant(
        "data.py", 'f">{dimensions}I"', 'f"<{dimensions}I"', "data", "the format has the high byte first"
    ),
    "labels not counted": Mutant(
        "data.py",
        "if images.shape != (len(labels), 28, 28) or len(labels) == 0:",
        "if images.shape[1:] != (28, 28) or len(labels) == 0:",
        "data",
        "images with the labels of others",
    ),
    "labels beyond the classes": Mutant(
        "data.py", "and 0 <= label <= 9 for", "and 0 <= label for", "data", "a damaged label"
    ),
    "colours interleaved": Mutant(
        "data.py",
        "torch.tensor(images).view(-1, 3, 32, 32)",
        "torch.tensor(images).view(-1, 32, 32, 3).permute(0, 3, 1, 2)",
        "data",
        "CIFAR-10 stores one colour plane after the other",
    ),
    "whatever a pickle names": Mutant(
        "data.py", "if (module, name) not in self.allowed:", "if False:", "data", "names that no batch has"
    ),
    "more behind the end of a gzip stream": Mutant(
        "data.py", "if not unzip.eof or unzip.unused_data:", "if not unzip.eof:", "data", "a file that goes on"
    ),
    # download.py
    "md5 of data not compared": Mutant(
        "download.py", "if md5 is not None and md5_of(content) != md5:", "if False:", "data", "damage unseen"
    ),
    "md5 of what came last": Mutant(
        "download.py",
        "found = md5_of(part.read_bytes())",
        "found = md5_of(part.read_bytes()[held:])",
        "download",
        "a download in two parts has one md5",
    ),
    "resumed one byte late": Mutant(
        "download.py", 'f"bytes={held}-"}', 'f"bytes={held + 1}-"}', "download", "a byte is missing"
    ),
    "a resumed part written anew": Mutant(
        "download.py", 'part.open("ab" if held else "wb")', 'part.open("wb")', "download", "the first part is lost"
    ),
    "downloaded under the final name": Mutant(
        "download.py",
        'part = path.with_name(f"{path.name}.part")',
        "part = path",
        "download",
        "half a file looks like a whole one",
    ),
    "a download not flushed to disk": Mutant(
        "download.py", "            os.fsync(file.fileno())\n", "", "download", "a rename before the data"
    ),
    "parts of a batch summed, not averaged": Mutant(
        "training.py",
        "self.scaler.scale(mine.mean() / self.accumulate)",
        "self.scaler.scale(mine.mean())",
        "training",
        "a gradient as many times too long as there are parts",
    ),
    # metrics.py, bound.py, families.py
    "a ball reaches one neighbour too short": Mutant(
        "metrics.py", ".kthvalue(k + 1)", ".kthvalue(k)", "metrics", "the point itself counted as a neighbour"
    ),
    "precision for recall": Mutant(
        "metrics.py",
        "_share_within(generated, real, k), _share_within(real, generated, k)",
        "_share_within(real, generated, k), _share_within(generated, real, k)",
        "metrics",
        "the two figures change places",
    ),
    "kernel distance with bias": Mutant(
        "metrics.py",
        "(values.sum() - values.trace()) / (len(x) * (len(x) - 1))",
        "values.mean()",
        "metrics",
        "each point compared with itself, too",
    ),
    "Inception score of the mean alone": Mutant(
        "metrics.py", "(log_p - log_mean)", "-log_mean", "metrics", "unsure classifiers count as diverse samples"
    ),
    "prior without the signal": Mutant(
        "bound.py", "(signal * _sum(x0.square())", "(_sum(x0.square())", "bound", "x_T taken for x_0"
    ),
    "KL without its logarithm": Mutant(
        "bound.py", "(ratio - 1 - math.log(ratio))", "(ratio - 1)", "bound", "a term of the KL of Gaussians forgotten"
    ),
    "the decoder's variance at t = 1": Mutant(
        "bound.py", "math.log(2 * math.pi * sigma2)", "math.log(2 * math.pi)", "bound", "a density not normalised"
    ),
    "guidance from the free guess": Mutant(
        "guidance.py",
        "eps = given.eps + weight",
        "eps = self._without(x_t, t).eps + weight",
        "guidance",
        "the other convention of the weight: w for 1 + w",
    ),
    "negative condition forgotten": Mutant(
        "guidance.py", "if self.negative is None:", "if True:", "guidance", "negative prompts do nothing, in silence"
    ),
    "gradient of p for that of log p": Mutant(
        "guidance.py",
        "log_p = logits.log_softmax(1)",
        "log_p = logits.softmax(1)",
        "guidance",
        "guidance dies where the classifier is sure of another class",
    ),
    "classifier's gradient taken for noise": Mutant(
        "guidance.py",
        "weight_at(self.weight, x_t, t) * noise * gradient",
        "weight_at(self.weight, x_t, t) * gradient",
        "guidance",
        "a score is eps over the deviation of the noise",
    ),
    "pixels stretched to 256": Mutant(
        "inception.py", "+ 1) * 127.5).round()", "+ 1) * 128).round()", "inception", "white wraps around to black"
    ),
    "Inception logits with the bias": Mutant(
        "inception.py",
        "features @ self.network.fc.weight.T",
        "self.network.fc(features)",
        "inception",
        "not the logits of the Inception score",
    ),
    "levels stretched to both ends": Mutant(
        "families.py",
        "* 2 / LEVELS - 1\n",
        "* 2 / (LEVELS - 1) - 1\n",
        "families",
        "dequantised points leave [-1, 1), and the bound on bits is off",
    ),
    "KL of the encoder without its logarithm": Mutant(
        "families.py", "- 1 - 2 * log_sigma)", "- 1)", "families", "a term of the KL of Gaussians forgotten"
    ),
    "the flow's determinant upside down": Mutant(
        "families.py", "+ shift, log_scale.sum(1)", "+ shift, -log_scale.sum(1)", "families", "the inverse's Jacobian"
    ),
    "the discriminator's fakes unseen": Mutant(
        "families.py",
        "+ F.softplus(self.discriminator(generated))",
        "+ F.softplus(-self.discriminator(generated))",
        "families",
        "generated points called real in training",
    ),
    # muon.py
    "no look ahead": Mutant(
        "muon.py",
        'p.grad.lerp(mean, group["momentum"])',
        "mean.clone()",
        "muon",
        "the step looks ahead by Nesterov's rule",
    ),
    "step as long as the short side": Mutant(
        "muon.py",
        "0.2 * max(ahead.shape)",
        "0.2 * min(ahead.shape)",
        "muon",
        "the step must be as long as one of Adam's",
    ),
    "weights that do not decay": Mutant(
        "muon.py",
        'p.mul_(1 - group["lr"] * group["weight_decay"])',
        "pass",
        "muon",
        "without decay the weights grow for as long as training lasts",
    ),
    # run.py
    "weights to start from only read": Mutant(
        "run.py",
        "        fit_state(denoiser.network, start, recipe.training.weights_from)\n",
        "        start\n",
        "run",
        "a run that should go on from another model began anew",
    ),
    # scene_reader.py
    "one known object is enough": Mutant(
        "scene_reader.py",
        "and all(fit.known for fit in fits):",
        "and any(fit.known for fit in fits):",
        "scenes",
        "a region with a hole or a bump counted as objects that touch",
    ),
    "leftovers of a region are nobody's": Mutant(
        "scene_reader.py",
        "own = region & (near[i] | ~near.any(0))",
        "own = region & near[i]",
        "scenes",
        "what lies beside two objects that touch was not held against them",
    ),
    "objects may cover each other": Mutant(
        "scene_reader.py",
        "if shared <= MISFIT and",
        "if shared <= 1 and",
        "scenes",
        "a small object painted on a large one was read as two, one in a colour that is not there",
    ),
    "only two objects touch": Mutant(
        "scene_reader.py",
        "MOST_TOUCHING = 4",
        "MOST_TOUCHING = 2",
        "scenes",
        "three or four objects that touch were one that is unknown",
    ),
    "colours cancel": Mutant(
        "scene_reader.py",
        "if not (axis @ pixels > 0).any():",
        "if False:",
        "scenes",
        "a picture whose colours have the median 0 ended in an error",
    ),
    # scene_posterior.py
    "equal objects in different colours": Mutant(
        "scene_posterior.py",
        "colourings = [(colour,) * len(choices) for colour in choices[0]]",
        "colourings = list(itertools.product(*choices))",
        "scene_posterior",
        "two equal circles left nine answers instead of three",
    ),
    "a blue circle is possible": Mutant(
        "scene_posterior.py",
        "if not HELD_OUT_OBJECTS.isdisjoint(objects):",
        "if not objects:",
        "scene_posterior",
        "objects that no scene holds got a share of the posterior",
    ),
    "every pair is possible": Mutant(
        "scene_posterior.py",
        "all(a != b and not held_out_pair(a, b) for a, b in pairs)",
        "all(a != b for a, b in pairs)",
        "scene_posterior",
        "pairs that no scene holds got a share of the posterior",
    ),
    "the whole sum of errors": Mutant(
        "scene_posterior.py",
        "for outcome in p.keys() | q.keys()) / 2",
        "for outcome in p.keys() | q.keys())",
        "scene_posterior",
        "a total variation distance up to 2",
    ),
    "blotched objects are read": Mutant(
        "scene_posterior.py",
        "if near.float().mean() >= MOST else UNKNOWN",
        "if near.float().mean() >= 0 else UNKNOWN",
        "scene_posterior",
        "an object of two colours counted as one of them",
    ),
    # degradation.py and inverse.py
    "gain of a degradation forgotten": Mutant(
        "degradation.py",
        "self.transpose(y) / (self.gain + ridge)",
        "self.transpose(y) / (1 + ridge)",
        "inverse",
        "the pseudo-inverse of an average is not its transpose",
    ),
    "nothing taken out before y is put in": Mutant(
        "inverse.py",
        "+ (x - self.degradation.pseudo_inverse(like))",
        "+ x",
        "inverse",
        "the known part must come from y alone",
    ),
    "clean y pasted": Mutant(
        "inverse.py",
        'signal", t, x_t) * y + self.schedule.at("noise", t, x_t) * A.forward(z)',
        'signal", t, x_t) * y',
        "inverse",
        "the known part of x_t needs the noise of its step",
    ),
    "likelihood without the signal": Mutant(
        "inverse.py",
        "prediction.noise**2 / prediction.signal * gradient",
        "prediction.noise**2 * gradient",
        "inverse",
        "Tweedie's formula divides by the signal",
    ),
    "data variance ignored": Mutant(
        "inverse.py",
        "v * noise**2 / (v * signal**2 + noise**2)",
        "noise**2 / (signal**2 + noise**2)",
        "inverse",
        "the guess is as uncertain as the data vary",
    ),
    "noise in y ignored": Mutant(
        "inverse.py",
        "return A.forward(covariance) + self.sigma**2 * u",
        "return A.forward(covariance)",
        "inverse",
        "a noisy observation must be trusted less",
    ),
    "climb without shrinking": Mutant(
        "inverse.py",
        "x = math.sqrt(1 - beta) * x + math.sqrt(beta)",
        "x = x + math.sqrt(beta)",
        "inverse",
        "going up is a step of the forward process",
    ),
    "sum of windows": Mutant(
        "inverse.py",
        "total / count, x_t",
        "total, x_t",
        "inverse",
        "overlapping predictions are averaged",
    ),
}


def killed(mutant: Mutant | None, tests: list[str]) -> bool:
    """Whether the tests fail on a copy of the project with this mistake planted (None: with no mistake)."""
    import pytest

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder).resolve()
        for part in ("ddpm_lib", "tests"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__", "browser"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        if mutant:
            file = copy / "ddpm_lib" / mutant.file
            file.write_text(file.read_text(encoding="utf-8").replace(mutant.old, mutant.new), encoding="utf-8")
        os.chdir(copy)
        sys.path.insert(0, str(copy))
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *(f"tests/test_{name}.py" for name in tests)])
        os.chdir(ROOT)
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            raise RuntimeError(f"pytest could not run the tests of {', '.join(tests)}: {code!r}")
        if not Path(sys.modules["ddpm_lib"].__file__).is_relative_to(copy):
            raise RuntimeError("the tests ran against another copy of the package")
    return code == pytest.ExitCode.TESTS_FAILED


def judged(name: str) -> tuple[str, bool]:
    return name, killed(MUTANTS[name], [MUTANTS[name].tests])


def healthy(tests: str) -> tuple[str, bool]:
    return tests, not killed(None, [tests])


def main(names: list[str]) -> None:
    started = time.monotonic()
    os.environ |= {"MPLBACKEND": "Agg", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    import hypothesis, scipy.stats, sklearn.datasets, torch  # noqa: E401, F401, I001  imported once, for every fork

    chosen = names or list(MUTANTS)
    files = sorted({MUTANTS[name].tests for name in chosen})
    # Each in a fresh fork of this process, which has not imported the package.
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        survivors = []
        for name, dead in pool.imap(judged, chosen, chunksize=1):
            mutant = MUTANTS[name]
            print(f"{'killed  ' if dead else 'SURVIVED'}  {mutant.file:14} {name}: {mutant.why}", flush=True)
            survivors += [] if dead else [name]
        sick = [tests for tests, well in pool.imap(healthy, files, chunksize=1) if not well]
    if sick:
        sys.exit(f"These tests fail without any mutant, so their verdicts mean nothing: {', '.join(sick)}.")
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants killed in {time.monotonic() - started:.0f} s.")
    if survivors:
        sys.exit(f"Survivors: {', '.join(survivors)}. Add a test that sees each.")


if __name__ == "__main__":
    main(sys.argv[1:])
