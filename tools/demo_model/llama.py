"""A plain Llama decoder in PyTorch, with the tensor names of Hugging Face.

Training uses this short version rather than `transformers` because it is easy
to compile; `evaluate.py` loads the exported weights with `transformers`, which
checks that the two agree.
"""

import torch
import torch.nn.functional as F
from torch import nn


# Strengths of the starting point that `Llama.start_as_induction` sets up.
BIAS = 3.0    # the part of the embedding that is the same for every token
SHARP = 1.6   # how sharply the first layer looks at one position
WRITE = 2.0   # how loudly it writes what it saw
MATCH = 2.0   # how strongly the second layer compares
WIDTH = 60    # directions of the residual stream for each earlier token
COMPARED = 18  # of them, how many one head compares for each of two tokens


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def rotate(x, cos, sin):
    """RoPE with the halves layout that Hugging Face uses."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
        self.head_dim = c["head_dim"]
        size = c["hidden_size"]
        self.q_proj = nn.Linear(size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, size, bias=False)

    @torch.no_grad()
    def start_as_lookup(self, compare):
        """Starts the heads near what looking up needs ("mimetic" initialisation).

        Each head copies what it attends to (output = half the transpose of
        value).  With `compare`, it attends to what is like the current content
        (query = key); without, as in the first layer, to anything, so that it
        can learn to look at the words just before.
        """
        group, size = self.heads // self.kv_heads, self.head_dim
        for head in range(self.heads):
            own = slice(head * size, (head + 1) * size)
            shared = slice(head // group * size, (head // group + 1) * size)
            self.o_proj.weight[:, own] = 0.5 * self.v_proj.weight[shared].T
            if compare:
                self.q_proj.weight[own] = self.k_proj.weight[shared]

    def forward(self, x, cos, sin):
        batch, length, _ = x.shape

        def split(y, heads):
            return y.view(batch, length, heads, self.head_dim).transpose(1, 2)

        q = rotate(split(self.q_proj(x), self.heads), cos, sin)
        k = rotate(split(self.k_proj(x), self.kv_heads), cos, sin)
        v = split(self.v_proj(x), self.kv_heads)
        group = self.heads // self.kv_heads
        k = k.repeat_interleave(group, dim=1).to(v.dtype)
        v = v.repeat_interleave(group, dim=1)
        y = F.scaled_dot_product_attention(q.to(v.dtype), k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        size, inner = c["hidden_size"], c["intermediate_size"]
        self.gate_proj = nn.Linear(size, inner, bias=False)
        self.up_proj = nn.Linear(size, inner, bias=False)
        self.down_proj = nn.Linear(inner, size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.mlp = MLP(c)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Token ids to logits; the output matrix is the embedding (tied)."""

    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.layers = nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"]))
        self.norm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        half = torch.arange(0, c["head_dim"], 2).float() / c["head_dim"]
        angles = torch.outer(torch.arange(c["max_position_embeddings"]).float(),
                             c["rope_theta"] ** -half)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                # The embedding starts as large as what the layers will add to
                # it, else which word it was drowns before the second layer can
                # compare words; the last norm makes up for it in the logits.
                # What the MLPs add starts at zero.
                std = 1.0 if "embed" in name else p.shape[1] ** -0.5
                std = 0.0 if name.endswith("down_proj.weight") else std
                nn.init.normal_(p, std=std)
        nn.init.constant_(self.norm.weight, 0.05)
        for number, layer in enumerate(self.layers):
            layer.self_attn.start_as_lookup(compare=number > 0)
        self.start_as_induction(c)

    @torch.no_grad()
    def start_as_induction(self, c):
        """Starts the first two layers near an induction circuit.

        Finding "what followed the last time these words stood here" is what recall
        is made of, and random weights take long to stumble on it.  So layer 0
        starts with heads that look one, two and three tokens back and write what
        they see into parts of the residual stream of their own; layer 1 with heads
        that compare the current and the previous token with what stood one and two
        tokens before each position, and copy from there.  Nothing is fixed: all of
        it is trained on.
        """
        size, dim, half = c["hidden_size"], c["head_dim"], c["head_dim"] // 2
        freq = c["rope_theta"] ** -(torch.arange(half).float() / half)
        # Direction 0 is the same for every token: it carries position only, and
        # everything that is about content stays out of it.
        self.embed_tokens.weight[:, 0] = BIAS
        no_bias = torch.zeros(size - 1, 1)
        basis = torch.cat((no_bias, torch.linalg.qr(torch.randn(size - 1, size - 1)).Q), 1)
        written = [basis[i * WIDTH:(i + 1) * WIDTH] for i in range(3)]
        # What a head sees of a token: `dim` orthogonal directions.
        seen = torch.cat((no_bias[:dim], torch.linalg.qr(torch.randn(size - 1, dim)).Q.T), 1)

        # Layer 0.  Key: the unrotated constant.  Query: the same constant turned
        # by `back` positions, so that RoPE makes the score highest exactly there.
        look = self.layers[0].self_attn
        look.q_proj.weight.mul_(0.02)
        look.k_proj.weight.mul_(0.02)
        for kv in range(look.kv_heads):
            rows = slice(kv * dim, (kv + 1) * dim)
            constant = torch.cat((torch.ones(half), torch.zeros(half)))
            look.k_proj.weight[rows, 0] = constant * SHARP
            look.v_proj.weight[rows] = seen
        for head, back in enumerate((1, 2, 3)):
            rows = slice(head * dim, (head + 1) * dim)
            angle = freq * back
            look.q_proj.weight[rows, 0] = torch.cat((angle.cos(), -angle.sin())) * SHARP
            look.o_proj.weight[:, rows] = 0
            look.o_proj.weight[:, rows.start:rows.start + WIDTH] = WRITE * written[head].T

        # Layer 1.  The comparison uses the slow RoPE frequencies, the ends of
        # both halves of a head: fast ones would turn far tokens out of phase.
        match = self.layers[1].self_attn
        match.q_proj.weight.mul_(0.1)
        match.k_proj.weight.mul_(0.1)
        slow = half - COMPARED
        for head in range(match.heads):
            kv = head * match.kv_heads // match.heads
            use = slice(kv * COMPARED, (kv + 1) * COMPARED)
            for part, asked, held in ((0, seen, written[0]), (half, written[0], written[1])):
                q, k = head * dim + part + slow, kv * dim + part + slow
                match.q_proj.weight[q:q + COMPARED] = MATCH * asked[use]
                match.k_proj.weight[k:k + COMPARED] = MATCH * held[use]

    def forward(self, ids):
        length = ids.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.linear(self.norm(x), self.embed_tokens.weight)
