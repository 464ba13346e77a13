"""Tiny random checkpoints of every family, and what transformers computes from them.

    make_families.py [--only NAME] [--out DIR]   writes DIR (default tests/golden/families), a folder a case
    make_families.py --check DIR                 makes them again elsewhere and compares; exit code 1 if any differs

A folder holds a checkpoint as on the hub and golden.json; README.md beside this file says what that holds and how
the numbers are made. The same versions give the same bytes.
"""

import argparse
import base64
import contextlib
import hashlib
import json
import math
import os
import platform
import re
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

import byte_tokenizer  # noqa: E402
from cases import CASES, Case, Feature  # noqa: E402

DEFAULT_OUT = Path(__file__).resolve().parents[2] / "tests" / "golden" / "families"

NEW_TOKENS = 64
# The least distance of the two best logits at every step: a reordered float32 sum moves a logit by a thousandth of it.
MIN_MARGIN = 0.01
# What the engine's tests allow, absolute up to a logit of 1, relative beyond (tests/server/model).
TOLERANCE = 2e-4
# A feature must move some recorded logit by this many tolerances when it is taken away.
MIN_RATIO = 100
ALL_POSITIONS = 2  # the prompt whose every position is recorded
# Another machine's float32 may add in another order.
CHECK_TOLERANCE = 1e-4


def seed_of(*words):
    return int.from_bytes(hashlib.sha256(" ".join(map(str, words)).encode()).digest()[:8], "little")


# Weights


def bell(rng, shape, std):
    """Nearly normal numbers from integers only: the same on every machine."""
    total = rng.integers(-(1 << 20), 1 << 20, size=(4, *shape)).sum(axis=0)
    return torch.from_numpy(total * (std * math.sqrt(3) / (2 << 20))).float()


def weights(name, shape, gains, counts_from_one, tied):
    """Values for one parameter, so that no part of the model fades beside the others.

    A matrix is scaled by its inputs; attention gets scores that prefer some tokens clearly; a router chooses
    clearly; what leaves attention and MLP is larger than the embedding where that is tied, or the best next token
    would always be the last one. `gains` overrides by regular expression.
    """
    rng = numpy.random.default_rng(seed_of(name, *shape))
    gain = next((g for pattern, g in gains.items() if re.search(pattern, name)), None)
    if "norm" in name and name.endswith("weight"):
        values = torch.from_numpy(rng.integers(0, 1 << 16, size=shape) / (1 << 16)).float() + 0.5
        return values * (gain or 1.0) - (1.0 if counts_from_one else 0.0)
    if name.endswith("bias"):
        return bell(rng, shape, gain or 0.5)
    fan_in = shape[-1]
    if "embed_tokens" in name:
        return bell(rng, shape, gain or (0.45 if tied else 1.0))
    if "lm_head" in name:
        return bell(rng, shape, (gain or 3.0) / math.sqrt(fan_in))
    if gain is None:
        gain = 4.0 if ".gate.weight" in name else 1.6 if re.search(r"(q|k|qkv)_proj", name) else 1.4
    return bell(rng, shape, gain / math.sqrt(fan_in))


def write_checkpoint(case: Case, folder: Path):
    folder.mkdir(parents=True)
    config_class = transformers.CONFIG_MAPPING[case.config["model_type"]]
    config = config_class.from_dict(json.loads(json.dumps(case.config)))
    with torch.device("meta"):
        model = model_class(case.config)(config)
    model = model.to_empty(device="cpu").to(torch.float32)
    text = case.config.get("text_config", case.config)
    gemma = text["model_type"].startswith("gemma")
    tied = config.get_text_config().tie_word_embeddings
    for name, parameter in model.named_parameters():
        values = weights(f"{case.name} {name}", tuple(parameter.shape), case.gains, gemma, tied)
        parameter.data.copy_(values)
    model.tie_weights()
    model = model.to(getattr(torch, case.dtype))
    model.generation_config = transformers.GenerationConfig()
    if case.shard_bytes:
        model.save_pretrained(folder, max_shard_size=case.shard_bytes)
    else:
        model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    for path in folder.iterdir():
        path.chmod(0o644)
    if not case.own_spelling:
        write_json(folder / "config.json", case.config)
    if case.generation is not None:
        write_json(folder / "generation_config.json", case.generation)


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n")


# The reference


def model_class(config):
    return getattr(transformers, config["architectures"][0])


def load(folder, dtype=torch.float32):
    config = json.loads((folder / "config.json").read_text())
    model, report = model_class(config).from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    wrong = {kind: keys for kind, keys in report.items() if keys}
    assert not wrong, wrong
    model.eval()
    # A generate() that takes nothing from anywhere else.
    model.generation_config = transformers.GenerationConfig()
    return model


@contextlib.contextmanager
def changed(folder, feature: Feature):
    """The model without a feature."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "copy"
        shutil.copytree(folder, copy)
        config = json.loads((copy / "config.json").read_text())
        for path, value in feature.config.items():
            place, *rest = path.split(".")[::-1]
            owner = config
            for part in rest[::-1]:
                owner = owner[part]
            if value is None and place not in ("sliding_window", "rope_scaling"):
                owner.pop(place, None)
            else:
                owner[place] = value
        # What save_pretrained of transformers 5 wrote spells these otherwise.
        parameters = config.get("rope_parameters")
        if parameters is not None:
            if "rope_theta" in feature.config:
                parameters["rope_theta"] = feature.config["rope_theta"]
            if "rope_scaling" in feature.config:
                config["rope_parameters"] = {"rope_type": "default", "rope_theta": parameters["rope_theta"]}
            config.pop("rope_scaling", None)
            config.pop("rope_theta", None)
        write_json(copy / "config.json", config)
        model = load(copy)
        if feature.edit is not None:
            with torch.inference_mode():
                feature.edit(model)
        yield model


def stretch(model, length):
    """Lets dynamic rotary frequencies grow to those of `length` tokens; shorter texts keep them from then on."""
    if length is not None:
        model(torch.zeros((1, length), dtype=torch.long), use_cache=False)


def all_logits(model, ids):
    """Logits of every position, float32 [tokens, vocabulary], computed at once."""
    return model(torch.tensor([ids]), use_cache=False).logits[0].float()


def greedy(model, ids):
    """64 tokens by generate() with its cache, and the least margin on the way."""
    out = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones((1, len(ids)), dtype=torch.long),
        generation_config=transformers.GenerationConfig(
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            use_cache=True,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        ),
    )
    tokens = out.sequences[0, len(ids) :].tolist()
    assert len(tokens) == NEW_TOKENS
    best = torch.stack(out.logits)[:, 0].topk(2).values
    return tokens, (best[:, 0] - best[:, 1]).min().item()


def choose_prompts(case, model, vocab, attempts):
    """For every length the first prompt of a seeded stream that keeps its margin and does not fall into a rut.

    `attempts`: which of the stream were taken before; where a margin is a hair's breadth from the limit, another
    machine might take another one.
    """
    out = []
    for i, length in enumerate(case.lengths):
        for attempt in attempts[i : i + 1] if attempts else range(200):
            rng = numpy.random.default_rng(seed_of(case.name, length, attempt))
            # No specials inside, as in a text; those beyond the tokenizer never come from a client.
            ids = rng.integers(0, min(256, vocab), size=length).tolist()
            tokens, margin = greedy(model, ids)
            if attempts or (margin >= MIN_MARGIN and len(set(tokens)) >= NEW_TOKENS // 4):
                break
        else:
            raise SystemExit(f"{case.name}: no prompt of {length} tokens will do")
        # What the cache gave is what the model gives without one.
        again = all_logits(model, ids + tokens)[len(ids) - 1 : -1].argmax(-1).tolist()
        assert again == tokens, f"{case.name}: generate() and the model without a cache disagree"
        out.append({"ids": ids, "greedy": tokens, "min_margin": margin, "attempt": attempt})
    return out


def recorded_logits(model, prompts):
    """What golden.json holds of a model: float32 [8 + positions of one prompt, vocabulary]."""
    last = [all_logits(model, prompt["ids"])[-1] for prompt in prompts]
    return torch.cat([torch.stack(last), all_logits(model, prompts[ALL_POSITIONS]["ids"])])


def differences(got, want):
    """The largest difference, absolute up to 1 and relative beyond."""
    return ((got - want).abs() / want.abs().clamp(min=1.0)).max().item()


def text_of_floats(tensor):
    return base64.b64encode(tensor.numpy().astype("<f4").tobytes()).decode()


def floats_of_text(text):
    return torch.from_numpy(numpy.frombuffer(base64.b64decode(text), "<f4").copy())


@torch.inference_mode()
def make_golden(case: Case, folder: Path, attempts):
    model = load(folder)
    vocab = model.config.get_text_config().vocab_size
    stretch(model, case.stretch)
    prompts = choose_prompts(case, model, vocab, attempts)
    logits = recorded_logits(model, prompts)
    spread = logits.std(dim=-1).mean().item()

    features = []
    for feature in case.features:
        with changed(folder, feature) as other:
            if feature.config.get("rope_scaling", 0) is not None:
                # Without config or edit, what is taken away is the stretching itself.
                stretch(other, case.stretch if feature.config or feature.edit else None)
            ratio = differences(recorded_logits(other, prompts), logits) / TOLERANCE
        assert ratio >= MIN_RATIO, f"{case.name}: without {feature.name} the logits move by {ratio:.1f} tolerances"
        features.append({"name": feature.name, "tolerances_moved": round(ratio)})

    # How far transformers itself is off when it computes in bfloat16.
    rounded = load(folder, torch.bfloat16)
    stretch(rounded, case.stretch)
    off = recorded_logits(rounded, prompts) - logits

    golden = {
        "case": case.name,
        "made_with": {
            "python": platform.python_version(),
            "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__,
            "numpy": numpy.__version__,
            "attention": "eager",
            "compute": "float32",
            "weights": case.dtype,
            "weights_seed": f"SHA-256 of '{case.name} PARAMETER SHAPE'",
        },
        "config": json.loads((folder / "config.json").read_text()),
        "max_model_len": case.max_model_len,
        "vocab": vocab,
        "new_tokens": NEW_TOKENS,
        "logit_spread": round(spread, 4),
        "transformers_in_bfloat16": {
            "max_error": round(off.abs().max().item(), 4),
            "rms_error": round(off.square().mean().sqrt().item(), 4),
        },
        "features": features,
        "prompts": [
            {
                "ids": prompt["ids"],
                "greedy": prompt["greedy"],
                "min_margin": round(prompt["min_margin"], 5),
                "attempt": prompt["attempt"],
                "last_logits": text_of_floats(row),
            }
            for prompt, row in zip(prompts, logits)
        ],
        "all_positions": {"prompt": ALL_POSITIONS, "logits": text_of_floats(logits[len(prompts) :])},
    }
    write_golden(folder / "golden.json", golden)
    return golden


def write_golden(path, golden):
    """A line a field, and a line a prompt."""
    compact = {"separators": (",", ":")}
    lines = []
    for key, value in golden.items():
        if key in ("prompts", "features"):
            text = "[\n  " + ",\n  ".join(json.dumps(item, **compact) for item in value) + "\n ]"
        else:
            text = json.dumps(value, **compact)
        lines.append(f' "{key}": {text}')
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def make(out: Path, only: str | None, committed: Path | None = None):
    """Writes the cases under `out`, with the prompts that `committed` took where that is given."""
    torch.set_num_threads(1)  # threads would change the order of sums
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    byte_tokenizer.write(out / "tokenizer")
    for case in CASES:
        if only not in (None, case.name):
            continue
        folder = out / case.name
        shutil.rmtree(folder, ignore_errors=True)
        write_checkpoint(case, folder)
        attempts = None
        if committed is not None and (committed / case.name / "golden.json").exists():
            prompts = json.loads((committed / case.name / "golden.json").read_text())["prompts"]
            attempts = [prompt["attempt"] for prompt in prompts]
        golden = make_golden(case, folder, attempts)
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(
            f"{case.name}: {size >> 10} KiB, spread {golden['logit_spread']}, bf16 error "
            f"{golden['transformers_in_bfloat16']['max_error']}, attempts "
            f"{[prompt['attempt'] for prompt in golden['prompts']]}, distinct "
            f"{[len(set(prompt['greedy'])) for prompt in golden['prompts']]}, "
            + ", ".join(f"{feature['name']} {feature['tolerances_moved']}" for feature in golden["features"]),
            flush=True,
        )


# --check


def compare(committed: Path, fresh: Path):
    """What differs between two folders of one case, one line each."""
    out = []
    names = {path.name for path in committed.iterdir()} | {path.name for path in fresh.iterdir()}
    for name in sorted(names - {"golden.json", "embeddings.json"}):
        pair = [folder / name for folder in (committed, fresh)]
        if not all(path.exists() for path in pair):
            out.append(f"{name} is only in one of them")
        elif pair[0].read_bytes() != pair[1].read_bytes():
            out.append(f"{name} differs")
    want, got = (json.loads((folder / "golden.json").read_text()) for folder in (committed, fresh))
    for key in ("config", "max_model_len", "vocab", "new_tokens"):
        if want[key] != got[key]:
            out.append(f"{key} differs")
    for i, (a, b) in enumerate(zip(want["prompts"], got["prompts"], strict=True)):
        for key in ("ids", "greedy"):
            if a[key] != b[key]:
                out.append(f"prompt {i}: {key} differ")
    rows = [[p["last_logits"] for p in g["prompts"]] + [g["all_positions"]["logits"]] for g in (want, got)]
    error = max(differences(floats_of_text(b), floats_of_text(a)) for a, b in zip(*rows))
    print(f"{committed.name}: logits differ by {error:.1e}", flush=True)
    if not error <= CHECK_TOLERANCE:
        out.append(f"logits differ by {error:.1e}; {CHECK_TOLERANCE:.0e} is allowed")
    return out


def check(committed: Path, only: str | None):
    with tempfile.TemporaryDirectory() as scratch:
        make(Path(scratch), only, committed)
        failed = []
        names = {path.name for path in Path(scratch).iterdir()}
        if only is None:
            names |= {path.name for path in committed.iterdir()}
        for name in sorted(names - {"tokenizer"}):
            folders = (committed / name, Path(scratch) / name)
            if not all(folder.is_dir() for folder in folders):
                failed.append(f"{name}: only in one of them")
            else:
                failed += [f"{name}: {line}" for line in compare(*folders)]
        for name in byte_tokenizer.FILES:
            if (committed / "tokenizer" / name).read_bytes() != (Path(scratch) / "tokenizer" / name).read_bytes():
                failed.append(f"tokenizer/{name} differs")
    for line in failed:
        print(line)
    print(f"{len(names) - 1} cases made again, {len(failed)} differences")
    return 1 if failed else 0


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", help="one case by name")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--check", type=Path, metavar="DIR")
    options = parser.parse_args()
    if options.check:
        return check(options.check, options.only)
    make(options.out, options.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
