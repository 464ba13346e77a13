"""What transformers gives as embeddings of the families' checkpoints.

    make_embeddings.py [--only NAME] [--out DIR]   reads DIR/CASE (default tests/golden/families, as make_families.py
                                                   wrote it) and writes DIR/CASE/embeddings.json
    make_embeddings.py --check                     computes them again and compares; exit code 1 if any differs

For each prompt of golden.json: the hidden state after the final norm of the last token, and the mean over all tokens
(summed in float64), float32, not normalised. Arithmetic as in make_families.py: float32, eager attention, one thread.
"""

import argparse
import json
import platform
import sys
from pathlib import Path

import make_families as families
import torch
import transformers
from cases import CASES


@torch.inference_mode()
def make(case, folder: Path):
    golden = json.loads((folder / "golden.json").read_text())
    model = families.load(folder)
    families.stretch(model, case.stretch)
    rows = []
    for prompt in golden["prompts"]:
        out = model(torch.tensor([prompt["ids"]]), use_cache=False, output_hidden_states=True)
        states = out.hidden_states[-1][0].float()  # the last of them is after the final norm
        # That it is: the head alone leads from it to the logits (up to a soft cap, which keeps the order).
        head = model.get_output_embeddings()(states.to(out.logits.dtype))
        assert torch.equal(head.argmax(-1), out.logits[0].argmax(-1)), case.name
        rows.append((states[-1], states.double().mean(0).float()))
    return rows


def write(path: Path, case, rows):
    families.write_golden(
        path,
        {
            "case": case.name,
            "made_with": {
                "python": platform.python_version(),
                "torch": torch.__version__.split("+")[0],
                "transformers": transformers.__version__,
            },
            "hidden": len(rows[0][0]),
            "prompts": [
                {"last": families.text_of_floats(last), "mean": families.text_of_floats(mean)} for last, mean in rows
            ],
        },
    )


def differs(path: Path, rows) -> bool:
    committed = json.loads(path.read_text())["prompts"]
    assert len(committed) == len(rows), path
    return any(
        families.differences(got, families.floats_of_text(want[kind])) > families.CHECK_TOLERANCE
        for want, row in zip(committed, rows)
        for kind, got in zip(("last", "mean"), row)
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--only")
    parser.add_argument("--out", type=Path, default=families.DEFAULT_OUT)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    wrong = []
    for case in CASES:
        if args.only not in (None, case.name):
            continue
        path = args.out / case.name / "embeddings.json"
        rows = make(case, path.parent)
        if not args.check:
            write(path, case, rows)
        elif differs(path, rows):
            wrong.append(case.name)
        print(case.name, flush=True)
    if wrong:
        sys.exit(f"differ: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
