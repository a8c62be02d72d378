"""losses.py and fusion.py, copied out: a check that needs torch and nothing else. In a folder with both files:

python alone.py losses        # says ok, or fails. Tried: torch 2.5.0 both; 2.4.0 and 1.13.1 losses alone
python alone.py fusion
"""

import sys
import warnings

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # torch says so where there is none

import torch  # noqa: E402


def losses():
    from losses import cross_entropy, distillation_loss, stage1_loss

    for B in (1, 2, 5):
        for C in (2, 6):
            logits, features = torch.randn(B, C, requires_grad=True), torch.randn(B, 8, requires_grad=True)
            teacher, labels = (torch.randn(B, C), torch.randn(B, 8)), torch.zeros(B, dtype=torch.int64)
            loss = stage1_loss(logits, labels, features, *teacher)
            parts = cross_entropy(logits, labels) + distillation_loss(logits, features, *teacher)
            assert torch.allclose(loss, parts)
            loss.backward()
            assert logits.grad.isfinite().all() and features.grad.isfinite().all(), (B, C)


def fusion():
    from fusion import MAGT, Concat, FusionConfig, Past

    widths = {"text": 16, "audio": 8, "video": 16}
    features = {m: torch.randn(7, width) for m, width in widths.items()}
    speakers, lengths = torch.tensor([1, 2, 1, 2, 0, 1, 1]), [4, 3]
    some = torch.tensor([True, False, True, True, True, False, True])
    for causal in (False, True):
        config = FusionConfig(widths, num_classes=5, num_speakers=2, width=16, heads=4, causal=causal)
        for model in (MAGT(config), Concat(config)):
            out = model(features, speakers, lengths, {"audio": some})
            out.logits["text"].sum().backward()
            assert all(x.isfinite().all() for part in out for x in part.values())
    model, past = MAGT(config).eval(), Past()
    whole = model(features, speakers, lengths, {"audio": some}).logits["text"]
    for i in range(4):
        row = slice(i, i + 1)
        step = model.step(past, {m: x[row] for m, x in features.items()}, speakers[row], {"audio": some[row]})
        assert torch.allclose(step.logits["text"][0], whole[i], atol=1e-5)
    silent = model(features, speakers, lengths, {"audio": torch.arange(7) < 4}).logits["text"]
    if not silent.isfinite().all():
        sys.exit("fusion: a conversation without any sound gives NaN; torch 2.5 or newer does not")


if __name__ == "__main__":
    torch.manual_seed(0)
    {"losses": losses, "fusion": fusion}[sys.argv[1]]()
    print(f"{sys.argv[1]}: ok with torch {torch.__version__}")
