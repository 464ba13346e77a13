"""Trains the demo model and exports it in Hugging Face layout.

    python train.py --out model

All hyperparameters are the constants below; a seed fixes the text, the
initial weights and the order.  The model starts near an induction circuit (see
`llama.py`), because looking facts up takes long to appear by itself.  The
curriculum lengthens the context step by step, because looking up is learned
much faster on short passages and then carries over to long ones.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import generate
import tokens
from llama import Llama

VOCAB_SIZE = 1280
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "use_cache": True,
    "torch_dtype": "bfloat16",
}

# The curriculum.  A stage ends once `enough` of the answer tokens of the last
# REPORT steps are right, or after `steps`.  `plain` is the share of rows that are
# plain text; `options` go to `generate.chat` and `generate.plain`.  At first
# nearly all facts of a passage are of one kind and each is said in one way only:
# then nothing but the subject tells which fact is meant, and that is the hard
# part of the task.
EASY = {"kind_counts": [1, 1, 1, 2], "usual_share": 1.0}
STAGES = [
    dict(length=96, rows=20, steps=300, enough=0.97, plain=0.8, notes=0.2, options=EASY),
    dict(length=128, rows=16, steps=400, enough=0.98, plain=0.3, notes=0.0, options={}),
    dict(length=256, rows=8, steps=800, enough=0.99, plain=0.1, notes=0.0, options={}),
    dict(length=512, rows=5, steps=800, enough=0.99, plain=0.1, notes=0.0, options={}),
    dict(length=1400, rows=2, steps=800, enough=2.0, plain=0.1, notes=0.0, options={}),
]
REPORT = 10
WARMUP = 50
DECAY_STEPS = 500         # the last steps of the last stage let the rates fall
MUON_LR = 0.01
MUON_MOMENTUM = 0.95
EMBED_LR = 1e-2           # AdamW
NORM_LR = 3e-3            # AdamW
ADAM_BETAS = (0.9, 0.98)
CLIP = 1.0
CONTEXT_WEIGHT = 0.03     # loss weight of text that is not an answer
SMALL_TALK_SHARE = 0.02   # rows of chat without a passage


def orthogonalise(g):
    """Newton-Schulz iteration of Muon: a matrix (batch) to nearly orthogonal."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return (x.mT if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal: for the inner matrices."""

    def __init__(self, params, lr, momentum):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                updates = []
                for p in params:
                    buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(buffer, group["momentum"]))
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                for p, u in zip(params, orthogonalise(torch.stack(updates))):
                    p.add_(u, alpha=-group["lr"] * scale)


def make_row(rng, encoder, stage):
    """Ids, targets and loss weights of one row."""
    length, options = stage["length"], stage["options"]
    roll = rng.random()
    if roll < stage["plain"]:
        ids, weights = encoder.plain(
            generate.plain(rng, length + 20, note_share=stage["notes"], **options))
    elif roll < stage["plain"] + SMALL_TALK_SHARE:
        ids, weights = encoder.chat(generate.small_talk(rng, length + 20))
    else:
        # From many questions on a short passage to few on a long one.
        share = rng.uniform(0.25, 0.8)
        ids, weights = encoder.chat(
            generate.chat(rng, int(length * share), length + 20, **options))
    missing = length + 1 - len(ids)
    ids = ids[:length + 1] + [encoder.special[tokens.PAD]] * missing
    weights = weights[:length + 1] + [0.0] * missing
    return ids[:-1], ids[1:], weights[1:]


def batches(encoder, seed, number):
    """The batches of one stage."""
    stage = STAGES[number]
    rng = generate.train_rng(seed * 100 + number)
    for _ in range(stage["steps"]):
        rows = [make_row(rng, encoder, stage) for _ in range(stage["rows"])]
        yield [torch.tensor(column) for column in zip(*rows)]


@torch.no_grad()
def probe(model, encoder, length, count=64):
    """Share of held-out code questions that get exactly the right answer."""
    rng = generate.heldout_rng(0)
    right = 0
    for _ in range(count):
        passage = generate.Passage(rng, int(length * 0.6), 0.2, usual_share=1.0)
        facts = [f for f in passage.facts if f.kind == "code"] or passage.facts
        fact = rng.choice(facts)
        ids, weights = encoder.chat([
            {"role": "user", "content": f"{passage.text()} {fact.question(rng)}"},
            {"role": "assistant", "content": fact.answer}])
        ids, asked = torch.tensor(ids), torch.tensor(weights)[1:] == 1
        best = model(ids[None])[0, :-1].argmax(-1)
        right += bool((best == ids[1:])[asked].all())
    return right / count


def rate(step, left):
    """Warm-up, a plateau, then a linear fall; `left` steps follow this one."""
    return min(1.0, (step + 1) / WARMUP, (left + 1) / DECAY_STEPS)


def export(model, folder):
    """Writes the weights as bfloat16 under the names of Hugging Face."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {f"model.{name}": p.detach().to(torch.bfloat16).contiguous()
             for name, p in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def export_config(tokenizer, folder):
    folder.mkdir(parents=True, exist_ok=True)
    ids = {name: tokenizer.token_to_id(name) for name in tokens.SPECIALS}
    ends = {"bos_token_id": ids[tokens.BOS], "pad_token_id": ids[tokens.PAD],
            "eos_token_id": [ids[tokens.END], ids[tokens.EOT]]}
    for name, data in (("config.json", CONFIG | ends),
                       ("generation_config.json", ends | {"do_sample": False})):
        (folder / name).write_text(json.dumps(data, indent=2) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens.save_tokenizer_config(folder, CONFIG["max_position_embeddings"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-compile", action="store_true",
                        help="run without torch.compile (no C++ compiler needed)")
    parser.add_argument("--resume", type=Path, metavar="FOLDER",
                        help="start from the weights of this export ...")
    parser.add_argument("--stage", type=int, default=0,
                        help="... and with this stage, after a run was cut off")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    tokenizer = tokens.train_tokenizer(VOCAB_SIZE, args.seed)
    encoder = tokens.Encoder(tokenizer, CONTEXT_WEIGHT)
    export_config(tokenizer, args.out)

    model = Llama(CONFIG)
    if args.resume:
        saved = load_file(args.resume / "model.safetensors")
        model.load_state_dict({name.removeprefix("model."): value.float()
                               for name, value in saved.items()})
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    norms = [p for p in model.parameters() if p.ndim == 1]
    optimisers = [Muon(matrices, MUON_LR, MUON_MOMENTUM)] + [
        torch.optim.AdamW(params, lr=lr, betas=ADAM_BETAS, weight_decay=0.0, fused=True)
        for params, lr in (([model.embed_tokens.weight], EMBED_LR), (norms, NORM_LR))]
    base_rates = [MUON_LR, EMBED_LR, NORM_LR]

    def losses(ids, targets, weights):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids).float().flatten(0, 1)
        each = F.cross_entropy(logits, targets.flatten(), reduction="none")
        weights = weights.flatten()
        right = (logits.argmax(-1) == targets.flatten()) & (weights == 1)
        return (each * weights).sum() / weights.sum(), right

    compute = losses if args.no_compile else torch.compile(losses, dynamic=False)

    digits = torch.tensor([tokenizer.token_to_id(d) for d in "0123456789"])
    step, seen, start, report_time = 0, 0, time.time(), time.time()
    for number, stage in list(enumerate(STAGES))[args.stage:]:
        last = number == len(STAGES) - 1
        sums = dict.fromkeys(
            ["loss", "right", "answers", "digits_right", "digits", "tokens"], 0)
        for i, (ids, targets, weights) in enumerate(batches(encoder, args.seed, number)):
            left = stage["steps"] - 1 - i if last else DECAY_STEPS
            for optimiser, base in zip(optimisers, base_rates):
                for group in optimiser.param_groups:
                    group["lr"] = base * rate(step, left)
            loss, right = compute(ids, targets, weights)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            step += 1

            asked = weights.flatten() == 1
            digit = asked & torch.isin(targets.flatten(), digits)
            sums["loss"] += loss.item()
            sums["right"] += right.sum().item()
            sums["answers"] += asked.sum().item()
            sums["digits_right"] += (right & digit).sum().item()
            sums["digits"] += digit.sum().item()
            sums["tokens"] += ids.numel()
            if step % REPORT:
                continue
            now = time.time()
            seen += sums["tokens"]
            share = sums["right"] / sums["answers"]
            print(f"stage {number} step {step} length {stage['length']} "
                  f"loss {sums['loss'] / REPORT:.4f} answer tokens {share:.4f} "
                  f"digits {sums['digits_right'] / max(1, sums['digits']):.4f} "
                  f"{sums['tokens'] / (now - report_time):.0f} tok/s "
                  f"{seen / 1e6:.1f}M tokens {(now - start) / 60:.1f} min", flush=True)
            report_time, sums = now, dict.fromkeys(sums, 0)
            if step % (4 * REPORT) == 0:
                score = probe(model, encoder, stage["length"])
                print(f"held-out questions right: {score:.3f}", flush=True)
                export(model, args.out)
            if share > stage["enough"] and i > REPORT:
                break
    export(model, args.out)
    print(f"done in {(time.time() - start) / 60:.1f} min", flush=True)


if __name__ == "__main__":
    main()
