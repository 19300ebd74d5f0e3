"""Three donors of one model, put together: which router finds the donor of a token?

stories260k is trained on with `upcycle train` on three texts, one donor each. The donors become the experts
of one Mixture of Experts, in which the rest is that of the base or the average of the donors. The router
starts at random, from prompts, by ridge regression or from centroids, and is then trained alone. The script
writes `results.json` and a figure. What is there is not repeated, and a run that was stopped goes on. If
nothing is missing, it prints and draws, and needs no checkpoint and no texts.

    python experiments/donors/run.py --checkpoint stories260k --texts FOLDER
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import common  # noqa: E402
import figure  # noqa: E402

DOMAINS = {"stories": "tinystories.txt", "plays": "tinyshakespeare.txt", "articles": "wikitext2-valid.txt"}
BACKBONES = ("base", "average")
ROUTERS = ("normal", "prompts", "ridge", "centroids")
VARIANTS = {f"{router}, {backbone}": (router, backbone) for backbone in BACKBONES for router in ROUTERS}
DENSE = ("base", *DOMAINS, "mean of weights")  # models without experts
RIGHT = {f"right networks, {backbone}": backbone for backbone in BACKBONES}
HELD_OUT = 12_000  # characters at the end of each text; as many before them are not used
DONOR_STEPS, ROUTER_STEPS = 150, 40  # of 2,048 and 1,024 tokens
LENGTH = 256


def train_part(domain: str, given: argparse.Namespace) -> Path:
    """Return the part of a text that is trained on."""
    return Path(given.runs / "texts" / f"{domain}.txt")


def held_out(given: argparse.Namespace) -> dict[str, Path]:
    """Return the parts that are scored, by domain."""
    return {domain: given.runs / "texts" / f"{domain}-held-out.txt" for domain in DOMAINS}


def cut(given: argparse.Namespace) -> None:
    """Cut every text in the part that is trained on and the part that is scored."""
    (given.runs / "texts").mkdir(parents=True, exist_ok=True)
    for domain, name in DOMAINS.items():
        text = (given.texts / name).read_text().replace("<|endoftext|>", "")
        train_part(domain, given).write_text(text[: -2 * HELD_OUT])
        held_out(given)[domain].write_text(text[-HELD_OUT:])


def table(
    domains: list[str], seed: int, steps: int, tokens: int, peak: float, given: argparse.Namespace
) -> dict[str, Any]:
    """Return what all run files have in common: equal shares of the texts of the domains."""
    sources = [{"path": str(train_part(domain, given))} for domain in domains]
    return {
        "source": str(given.checkpoint),
        "data": {"sources": sources, "append_eos": False, "cache": str(given.runs / "tokens")},
        "train": {
            "steps": steps, "batch_tokens": tokens, "sequence_length": 256, "precision": "float32",
            "eval_every": 0,
        },
        "schedule": {"name": "cosine", "peak": peak, "warmup": max(1, steps // 20)},
        "checkpoint": {"every": 100, "keep": 1},
        "seed": seed,
    }  # fmt: skip


def donor_table(domain: str, given: argparse.Namespace) -> dict[str, Any]:
    """Return the run file of a donor."""
    return table([domain], 0, DONOR_STEPS, 2048, 1e-3, given) | {"out": str(given.runs / f"{domain}-run")}


def recipe(variant: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """Return the recipe of the donors put together."""
    router, backbone = VARIANTS[variant]
    start: dict[str, Any] = {"name": router}
    if router != "normal":
        start["statistics"] = str(statistics(router, seed, given))
    return {
        "moe": {"num_experts": len(DOMAINS), "top_k": 2},
        "init": {
            "name": "experts", "backbone": backbone,
            "expert": [{"source": str(given.runs / domain)} for domain in DOMAINS],
        },
        "router": {"init": start},
    }  # fmt: skip


def router_table(variant: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """Return the run file that trains the router alone, on equal shares of the three texts."""
    run = table([*DOMAINS], seed, ROUTER_STEPS, 1024, 1e-2, given) | recipe(variant, seed, given)
    run["train"]["only"] = ["router"]
    return run | {"out": str(given.runs / f"{variant.replace(', ', '-')}-{seed}-run")}


def statistics(router: str, seed: int, given: argparse.Namespace) -> Path:
    """Return the file of statistics that a router starts from: of the prompts, or of a draw of the texts."""
    import upcycle

    of_prompts = router == "prompts"
    out = Path(given.runs / ("prompts.safetensors" if of_prompts else f"texts-{seed}.safetensors"))
    if out.exists():
        return out
    if of_prompts:
        upcycle.calibrate(
            given.checkpoint, out, prompts=HERE / "prompts.toml", collect=("mean",), positions=("channels",),
            device="cpu",
        )  # fmt: skip
    else:
        upcycle.calibrate(
            given.checkpoint, out, domains={domain: train_part(domain, given) for domain in DOMAINS},
            collect=("mean", "second_moment", "sample"), positions=("channels",), limit=64, length=LENGTH,
            seed=seed, device="cpu",
        )  # fmt: skip
    return out


def trained(run: dict[str, Any], out: Path) -> Path:
    """Train a run, or what is left of it, and export it to `out`."""
    import upcycle

    if not out.exists():
        if not upcycle.train(run, resume=True).finished:
            sys.exit(f"{run['out']} was stopped; start the script again, and it goes on")
        upcycle.export(run["out"], out)
    return out


Weights = dict[str, Any]


def weights_of(folder: Path) -> Weights:
    """Return the weights of a dense model."""
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def written(weights: Weights, like: Path, out: Path) -> Path:
    """Write a model with these weights, and with the rest of the folder `like`."""
    from safetensors.numpy import save_file

    if not out.exists():
        shutil.copytree(like, partial := out.with_suffix(".partial"), dirs_exist_ok=True)
        save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
        partial.rename(out)
    return out


def mean_of(folders: list[Path], out: Path) -> Path:
    """Write the dense model whose weights are the means of those of several models."""
    import numpy as np

    models = [weights_of(folder) for folder in folders]
    means = {name: np.mean([m[name] for m in models], axis=0, dtype=np.float64) for name in models[0]}
    return written(
        {name: mean.astype(models[0][name].dtype) for name, mean in means.items()}, folders[0], out
    )


def right_networks(backbone: str, given: argparse.Namespace) -> dict[str, float]:
    """Return the losses of a router with top-1 that is never wrong: the donor's networks in the backbone."""
    around = weights_of(model("base" if backbone == "base" else "mean of weights", given))
    found = {}
    for domain in DOMAINS:
        donor = model(domain, given)
        networks = {name: w for name, w in weights_of(donor).items() if ".mlp." in name}
        put = written({**around, **networks}, donor, given.runs / f"{domain}-in-{backbone}")
        found[domain] = score(put, given).loss[domain]
    return found


def model(name: str, given: argparse.Namespace) -> Path:
    """Return the folder of a dense model, which is made if it is not there."""
    if name == "base":
        return Path(given.checkpoint)
    if name == "mean of weights":
        return mean_of([model(domain, given) for domain in DOMAINS], given.runs / "mean")
    return trained(donor_table(name, given), given.runs / name)


class Score(NamedTuple):
    """What a model does with the held-out texts."""

    loss: dict[str, float]  # nats per token, by domain
    first_choice: list[list[list[float]]]  # [L, domains, E]: shares of the tokens of a domain; [] if dense

    @property
    def mean(self) -> float:
        """The mean loss of the domains."""
        return sum(self.loss.values()) / len(self.loss)

    @property
    def right(self) -> float:
        """How often the first choice is the donor of the domain, over layers and domains."""
        return sum(map(right_in, self.first_choice)) / len(self.first_choice)


def right_in(layer: list[list[float]]) -> float:
    """Return how often the first choice of one layer is the donor of the domain."""
    return sum(of[domain] for domain, of in enumerate(layer)) / len(layer)


def score(checkpoint: Path, given: argparse.Namespace, **config: Any) -> Score:
    """Score a model on rows of the held-out texts; the first token of a row is not predicted.

    `config` are values that go over those of its config.
    """
    import torch
    from torch.nn.functional import cross_entropy

    import upcycle
    from upcycle.data.corpus import read_tokenizer
    from upcycle.training.routing import Routers

    model, tokenizer = upcycle.open(checkpoint, **config).eval(), read_tokenizer(checkpoint)
    routers = Routers.of(model)
    loss, chosen = {}, []
    for domain, text in held_out(given).items():
        ids = tokenizer(text.read_text(), add_special_tokens=False, return_tensors="pt").input_ids[0]
        rows = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)
        with torch.inference_mode(), routers.recording() if routers else nullcontext():
            logits = model(rows).logits
        loss[domain] = round(float(cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())), 5)
        firsts = [output.logits.argmax(-1) for output in routers.outputs] if routers else []
        chosen.append([torch.bincount(first, minlength=len(DOMAINS)) / len(first) for first in firsts])
    shares = [[[round(float(x), 4) for x in share] for share in layer] for layer in zip(*chosen, strict=True)]
    return Score(loss, shares)


def folders(variant: str, seed: int, given: argparse.Namespace) -> tuple[Path, Path]:
    """Return the folders of the result before and after its router is trained."""
    name = f"{variant.replace(', ', '-')}-{seed}"
    return given.runs / f"{name}-before", given.runs / name


def go(variant: str, seed: int, given: argparse.Namespace) -> common.Result:
    """Put the donors together, and score the result before and after its router is trained."""
    import upcycle

    for domain in DOMAINS:
        model(domain, given)
    before, folder = folders(variant, seed, given)
    if not before.exists():
        upcycle.convert(given.checkpoint, before, {"seed": seed, **recipe(variant, seed, given)})
    after = trained(router_table(variant, seed, given), folder)
    scores = {"before": score(before, given), "after": score(after, given)}
    for when, found in scores.items():
        print(f"{variant} {seed} {when}: {found.mean:.4f}, {found.right:.3f}", flush=True)
    return {"variant": variant, "seed": seed} | {when: found._asdict() for when, found in scores.items()}


def with_one_expert(variant: str, given: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return the losses of the results of seed 0 if a token has one expert."""
    found = zip(("before", "after"), folders(variant, 0, given), strict=True)
    return {when: score(folder, given, num_experts_per_tok=1).loss for when, folder in found}


def show(
    dense: dict[str, dict[str, float]],
    top_1: dict[str, dict[str, dict[str, float]]],
    runs: list[common.Result],
) -> None:
    """Print the tables in Markdown, and draw how often each layer picks the right donor."""
    oracle = {domain: dense[domain][domain] for domain in DOMAINS}
    one = {f"{variant}, {when}, top-1": x for variant, of in top_1.items() for when, x in of.items()}
    for name, loss in {**dense, "oracle": oracle, **one}.items():
        cells = " | ".join(f"{x:.3f}" for x in (*loss.values(), Score(loss, []).mean))
        print(f"| {name} | {cells} | |")
    curves: dict[str, list[list[tuple[float, float]]]] = {}
    for variant, when in itertools.product(VARIANTS, ("before", "after")):
        found = [Score(**run[when]) for run in runs if run["variant"] == variant]
        if not found:
            continue
        values = [*([s.loss[domain] for s in found] for domain in DOMAINS), [s.mean for s in found]]
        cells = " | ".join(mean_text(x, 3) for x in values)
        picks = mean_text([100 * s.right for s in found], 1)
        print(f"| {variant}, {when} ({len(found)}) | {cells} | {picks} |")
        router, backbone = VARIANTS[variant]
        if backbone == "base":
            curves[f"{router}, {when}"] = [
                [(layer, right_in(shares)) for layer, shares in enumerate(s.first_choice)] for s in found
            ]
    title = "The first choice is the donor of the text"
    figure.write(HERE / "figure.png", title, curves, "layer", "share of tokens")


def mean_text(values: list[float], digits: int) -> str:
    """Return the mean with its standard error, if that is known, with so many digits."""
    mean, error = common.mean_and_error(values)
    return f"{mean:.{digits}f}" + common.error_text(error, f" ± {{:.{digits}f}}")


def missing(known: dict[str, Any], jobs: list[tuple[str, int]]) -> list[str]:
    """Return the names of what the results lack."""
    done = {(run["variant"], run["seed"]) for run in known.get("runs", ())}
    lacking = [name for name in (*DENSE, *RIGHT) if name not in known.get("dense", {})]
    lacking += [f"{variant}, top-1" for variant in VARIANTS if variant not in known.get("top_1", {})]
    return lacking + [f"{variant}, seed {seed}" for variant, seed in jobs if (variant, seed) not in done]


def gather(
    results: Path, known: dict[str, Any], jobs: list[tuple[str, int]], given: argparse.Namespace
) -> None:
    """Run what the results lack, and add it."""
    cut(given)
    dense, top_1 = known.get("dense", {}), known.get("top_1", {})
    for name in DENSE:
        dense[name] = dense.get(name) or score(model(name, given), given).loss
    for name, backbone in RIGHT.items():
        dense[name] = dense.get(name) or right_networks(backbone, given)
    about = {"dense": dense, "top_1": top_1}
    common.gather(results, jobs, lambda variant, seed: go(variant, seed, given), list(VARIANTS), 1, about)
    for variant in VARIANTS:
        top_1[variant] = top_1.get(variant) or with_one_expert(variant, given)
    common.results_file(results, list(VARIANTS)).add(about)


def main() -> None:
    """Run what `results.json` does not have, print the tables and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="stories260k; to train what is missing")
    parser.add_argument("--texts", type=Path, help=f"folder of {', '.join(DOMAINS.values())}; for the same")
    parser.add_argument("--runs", type=Path, default=HERE / "runs")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    results = HERE / "results.json"
    known = json.loads(results.read_text()) if results.exists() else {}
    jobs = [(variant, seed) for seed in range(given.seeds) for variant in VARIANTS]
    if lacking := missing(known, jobs):
        if given.checkpoint is None or given.texts is None:
            sys.exit(f"{len(lacking)} results are missing: give --checkpoint and --texts to make them")
        gather(results, known, jobs, given)
        known = json.loads(results.read_text())
    show(known["dense"], known["top_1"], known["runs"])


if __name__ == "__main__":
    main()
