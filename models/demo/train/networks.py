"""The other networks in PyTorch, with the tensor names of the native checkpoint: transformer, Whisper's encoder, CLIP's
text network, LLaVA. Written from the model's specification, not from the product's code."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """(.., L, heads·width) each; scale 1/sqrt(width)."""
    split = lambda x: x.unflatten(-1, (heads, -1)).transpose(-2, -3)  # noqa: E731
    return F.scaled_dot_product_attention(split(q), split(k), split(v), attn_mask=mask).transpose(-2, -3).flatten(-2)


# Whisper's encoder.


class WhisperLayer(nn.Module):
    def __init__(self, width: int, inner: int, heads: int):
        super().__init__()
        self.heads = heads
        self.self_attn = nn.Module()
        for name in ("q_proj", "v_proj", "out_proj"):
            setattr(self.self_attn, name, nn.Linear(width, width))
        self.self_attn.k_proj = nn.Linear(width, width, bias=False)
        self.self_attn_layer_norm, self.final_layer_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        a, y = self.self_attn, self.self_attn_layer_norm(x)
        x = x + a.out_proj(attend(a.q_proj(y), a.k_proj(y), a.v_proj(y), self.heads))
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class Whisper(nn.Module):
    def __init__(self, width: int, inner: int, layers: int, heads: int, bands: int = 80, positions: int = 1500):
        super().__init__()
        encoder = self.encoder = nn.Module()
        encoder.conv1 = nn.Conv1d(bands, width, 3, padding=1)
        encoder.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)
        encoder.embed_positions = nn.Embedding(positions, width)
        encoder.layers = nn.ModuleList([WhisperLayer(width, inner, heads) for _ in range(layers)])
        encoder.layer_norm = nn.LayerNorm(width)
        # Sinusoids, as in the published checkpoint.
        rates = torch.exp(-math.log(10_000) * torch.arange(width // 2) / (width // 2 - 1))
        angles = torch.arange(positions)[:, None] * rates
        encoder.embed_positions.weight.data = torch.cat([angles.sin(), angles.cos()], 1)

    def forward(self, mel: Tensor) -> Tensor:
        """(B, bands, 3000) -> (B, 1500, states, width): before each layer, and the normalised output of the last."""
        e = self.encoder
        x = F.gelu(e.conv2(F.gelu(e.conv1(mel)))).transpose(1, 2) + e.embed_positions.weight
        states = []
        for layer in e.layers:
            states.append(x)
            x = layer(x)
        return torch.stack([*states, e.layer_norm(x)], 2)


def mel_filters() -> Tensor:
    """(201, 80): triangles on Slaney's scale, each of the same area."""
    def to_mel(hz):
        return torch.where(hz < 1000, hz * 3 / 200, 15 + torch.log(hz.clamp_min(1) / 1000) * 27 / math.log(6.4))

    def to_hz(mel):
        return torch.where(mel < 15, mel * 200 / 3, 1000 * torch.exp((mel - 15) * math.log(6.4) / 27))

    edges = to_hz(torch.linspace(0, to_mel(torch.tensor(8000.0, dtype=torch.float64)).item(), 82, dtype=torch.float64))
    hz = torch.linspace(0, 8000, 201, dtype=torch.float64)[:, None]
    up = (hz - edges[:-2]) / (edges[1:-1] - edges[:-2])
    down = (edges[2:] - hz) / (edges[2:] - edges[1:-1])
    return (torch.minimum(up, down).clamp_min(0) * 2 / (edges[2:] - edges[:-2])).float()


def log_mel(samples: Tensor) -> Tensor:
    """At most 30 s of 16 kHz -> (80, 3000), filled with silence."""
    samples = F.pad(samples.float(), (0, 480_000 - len(samples)))
    window = torch.hann_window(400)
    spectrum = torch.stft(samples, 400, 160, window=window, center=True, pad_mode="reflect", return_complex=True)
    power = spectrum[:, :-1].abs().square()  # (201, 3000)
    mel = torch.log10((mel_filters().T @ power).clamp_min(1e-10))
    return (torch.maximum(mel, mel.max() - 8) + 4) / 4


def windows(features: Tensor, frames: Tensor) -> Tensor:
    """(S, states, width) -> (frames, 10, states, width): from 4 positions before each frame on, zero outside."""
    count = len(features)
    at = frames[:, None] * 2 - 4 + torch.arange(10)
    inside = (at >= 0) & (at < count)
    return features[at.clamp(0, count - 1)] * inside[..., None, None]


# CLIP's blocks, for text and for pictures.


class ClipLayer(nn.Module):
    def __init__(self, width: int, inner: int, heads: int):
        super().__init__()
        self.heads = heads
        self.self_attn = nn.Module()
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self.self_attn, name, nn.Linear(width, width))
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        a, y = self.self_attn, self.layer_norm1(x)
        x = x + a.out_proj(attend(a.q_proj(y), a.k_proj(y), a.v_proj(y), self.heads, mask))
        y = self.mlp.fc1(self.layer_norm2(x))
        return x + self.mlp.fc2(y * torch.sigmoid(1.702 * y))


class ClipText(nn.Module):
    def __init__(self, width: int, inner: int, layers: int, heads: int, words: int, positions: int, end: int | None = None):
        """`end`: the id of the end token; nothing for the largest id of a text."""
        super().__init__()
        self.end = end
        t = self.text_model = nn.Module()
        t.embeddings = nn.Module()
        t.embeddings.token_embedding = nn.Embedding(words, width)
        t.embeddings.position_embedding = nn.Embedding(positions, width)
        t.encoder = nn.Module()
        t.encoder.layers = nn.ModuleList([ClipLayer(width, inner, heads) for _ in range(layers)])
        t.final_layer_norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask (B, L) -> pooled (B, width): the state at each text's first end."""
        t, length = self.text_model, ids.shape[1]
        x = t.embeddings.token_embedding(ids) + t.embeddings.position_embedding.weight[:length]
        sees = torch.ones(length, length, dtype=torch.bool).tril()[None, None] & mask[:, None, None].bool()
        for layer in t.encoder.layers:
            x = layer(x, sees)
        ends = ids if self.end is None else (ids == self.end).int()
        return t.final_layer_norm(x)[torch.arange(len(ids)), ends.argmax(1)]


# LLaVA.


class RmsNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class LlamaLayer(nn.Module):
    def __init__(self, width: int, keys: int, inner: int, heads: int, kv_heads: int, eps: float):
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        a = self.self_attn = nn.Module()
        a.q_proj, a.o_proj = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        a.k_proj, a.v_proj = nn.Linear(width, keys, bias=False), nn.Linear(width, keys, bias=False)
        m = self.mlp = nn.Module()
        m.gate_proj, m.up_proj = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        m.down_proj = nn.Linear(inner, width, bias=False)
        self.input_layernorm, self.post_attention_layernorm = RmsNorm(width, eps), RmsNorm(width, eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        a, m, y = self.self_attn, self.mlp, self.input_layernorm(x)

        def turned(z: Tensor, heads: int) -> Tensor:
            z = z.unflatten(-1, (heads, -1)).transpose(-2, -3)
            one, two = z.chunk(2, -1)
            return torch.cat([one * cos - two * sin, two * cos + one * sin], -1)

        q, k = turned(a.q_proj(y), self.heads), turned(a.k_proj(y), self.kv_heads)
        v = a.v_proj(y).unflatten(-1, (self.kv_heads, -1)).transpose(-2, -3)
        k, v = (z.repeat_interleave(self.heads // self.kv_heads, -3) for z in (k, v))
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(-2, -3).flatten(-2)
        x = x + a.o_proj(o)
        y = self.post_attention_layernorm(x)
        return x + m.down_proj(F.silu(m.gate_proj(y)) * m.up_proj(y))


class Llava(nn.Module):
    """Vision tower, projector and Llama; `layers` and `vision_layers` are those of the whole networks."""

    def __init__(self, c: dict):
        super().__init__()
        self.c = c
        self.vision_tower = nn.Module()
        v = self.vision_tower.vision_model = nn.Module()
        v.embeddings = nn.Module()
        v.embeddings.class_embedding = nn.Parameter(torch.randn(c["vision"]) * 0.2)
        v.embeddings.patch_embedding = nn.Conv2d(3, c["vision"], c["patch"], c["patch"], bias=False)
        v.embeddings.position_embedding = nn.Embedding(c["grid"] ** 2 + 1, c["vision"])
        v.pre_layrnorm = nn.LayerNorm(c["vision"])
        v.encoder = nn.Module()
        used = c["vision_layers"] - 1
        v.encoder.layers = nn.ModuleList([ClipLayer(c["vision"], c["vision_inner"], c["vision_heads"]) for _ in range(used)])
        p = self.multi_modal_projector = nn.Module()
        p.linear_1, p.linear_2 = nn.Linear(c["vision"], c["width"]), nn.Linear(c["width"], c["width"])
        self.language_model = nn.Module()
        m = self.language_model.model = nn.Module()
        m.embed_tokens = nn.Embedding(c["words"], c["width"])
        make = lambda: LlamaLayer(c["width"], c["keys"], c["inner"], c["heads"], c["kv_heads"], 1e-5)  # noqa: E731
        m.layers = nn.ModuleList([make() for _ in range(c["layers"] - 2)])

    def picture(self, pixels: Tensor) -> Tensor:
        """(B, 3, side, side), normalised -> (B, patches, width)."""
        v, p = self.vision_tower.vision_model, self.multi_modal_projector
        x = v.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([v.embeddings.class_embedding.expand(len(x), 1, -1), x], 1) + v.embeddings.position_embedding.weight
        x = v.pre_layrnorm(x)
        for layer in v.encoder.layers:
            x = layer(x)
        return p.linear_2(F.gelu(p.linear_1(x[:, 1:])))

    def forward(self, ids: Tensor, mask: Tensor, pixels: Tensor, crop: int) -> tuple[Tensor, Tensor]:
        """One text: ids, mask (L), pixels (3, side, side) -> states (rows, width) and their mask (rows)."""
        m, tokens = self.language_model.model, int(mask.sum())
        image = int((ids[:tokens] == self.c["image_token"]).nonzero())
        features = self.picture(pixels[None])[0]
        embed = m.embed_tokens
        x = torch.cat([embed(ids[:image]), features, embed(ids[image + 1 : tokens])])
        valid, padding = len(x), len(ids) - tokens
        x = torch.cat([x, x.new_zeros(1, x.shape[1])])[None]
        positions = torch.cat([torch.arange(valid), torch.tensor([1])])
        half = self.c["width"] // self.c["heads"] // 2
        angles = positions[:, None] * self.c["rope_theta"] ** (-torch.arange(half) / half)
        sees = torch.ones(valid + 1, valid + 1, dtype=torch.bool).tril()
        sees[valid, valid] = False
        for layer in m.layers:
            x = layer(x, angles.cos(), angles.sin(), sees)
        states = torch.cat([x[0, :valid], x[0, valid:].expand(padding, -1)])[crop:]
        patches = features.shape[0]
        return states, torch.cat([mask, mask.new_ones(patches - 1)])[crop:]


# The transformer.


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, L, H); shift, scale (B, H)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class NumberEmbedder(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        angles = t.float()[..., None] * torch.exp(-math.log(10_000) * torch.arange(128) / 128)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1))


class Mlp(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)


class Modulation(nn.Module):
    def __init__(self, width: int, parts: int):
        super().__init__()
        self.linear = nn.Linear(width, parts * width)

    def forward(self, vec: Tensor) -> Tensor:
        return self.linear(F.silu(vec))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, heads, L, d), adjacent channels in pairs; cos, sin (L, d/2)."""
    one, two = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([one * cos - two * sin, two * cos + one * sin], -1).flatten(-2)


def rope(frames: int, rows: int, columns: int, dims: list[int], theta: float) -> tuple[Tensor, Tensor]:
    """Angles of the reference frame (-1) and of the frames, (tokens, d/2) each for cos and sin."""
    grid = torch.meshgrid(torch.arange(-1, frames), torch.arange(rows), torch.arange(columns), indexing="ij")
    parts = [g.flatten()[:, None] * theta ** (-torch.arange(0, d, 2) / d) for g, d in zip(grid, dims, strict=True)]
    angles = torch.cat(parts, 1)
    return angles.cos(), angles.sin()


class DoubleBlock(nn.Module):
    def __init__(self, width: int, heads: int, inner: int):
        super().__init__()
        self.heads = heads
        for s in ("img", "txt"):
            setattr(self, f"{s}_mod", Modulation(width, 6))
            setattr(self, f"{s}_attn_qkv", nn.Linear(width, 3 * width))
            setattr(self, f"{s}_attn_q_norm", RmsNorm(width // heads, 1e-6))
            setattr(self, f"{s}_attn_k_norm", RmsNorm(width // heads, 1e-6))
            setattr(self, f"{s}_attn_proj", nn.Linear(width, width))
            setattr(self, f"{s}_mlp", Mlp(width, inner))

    def _qkv(self, s: str, x: Tensor):
        q, k, v = getattr(self, f"{s}_attn_qkv")(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return getattr(self, f"{s}_attn_q_norm")(q), getattr(self, f"{s}_attn_k_norm")(k), v

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, turn, mask: Tensor | None):
        parts, qkv = {}, {}
        for s, x in (("img", img), ("txt", txt)):
            parts[s] = getattr(self, f"{s}_mod")(vec).chunk(6, -1)
            qkv[s] = self._qkv(s, modulate(x, parts[s][0], parts[s][1]))
        q = torch.cat([rotate(qkv["img"][0], *turn), qkv["txt"][0]], 2)
        k = torch.cat([rotate(qkv["img"][1], *turn), qkv["txt"][1]], 2)
        v = torch.cat([qkv["img"][2], qkv["txt"][2]], 2)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        done = []
        for s, x, o in (("img", img, o[:, : img.shape[1]]), ("txt", txt, o[:, img.shape[1] :])):
            _, _, gate1, shift2, scale2, gate2 = parts[s]
            x = x + gate1[:, None] * getattr(self, f"{s}_attn_proj")(o)
            mlp = getattr(self, f"{s}_mlp")
            y = mlp.fc2(F.gelu(mlp.fc1(modulate(x, shift2, scale2)), approximate="tanh"))
            done.append(x + gate2[:, None] * y)
        return done


class SingleBlock(nn.Module):
    def __init__(self, width: int, heads: int, inner: int):
        super().__init__()
        self.heads = heads
        self.modulation = Modulation(width, 3)
        self.linear1, self.linear2 = nn.Linear(width, 3 * width + inner), nn.Linear(width + inner, width)
        self.q_norm, self.k_norm = RmsNorm(width // heads, 1e-6), RmsNorm(width // heads, 1e-6)

    def forward(self, x: Tensor, vec: Tensor, turn, mask: Tensor | None) -> Tensor:
        width, pictures = x.shape[-1], len(turn[0])
        shift, scale, gate = self.modulation(vec).chunk(3, -1)
        qkv, mlp = self.linear1(modulate(x, shift, scale)).split([3 * width, self.linear1.out_features - 3 * width], -1)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        q, k = (torch.cat([rotate(z[:, :, :pictures], *turn), z[:, :, pictures:]], 2) for z in (q, k))
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        return x + gate[:, None] * self.linear2(torch.cat([o, F.gelu(mlp, approximate="tanh")], -1))


class RefinerBlock(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.self_attn_qkv, self.self_attn_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = Mlp(width, inner)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))


class Refiner(nn.Module):
    def __init__(self, text: int, width: int, heads: int, inner: int):
        super().__init__()
        self.heads = heads
        self.input_embedder = nn.Linear(text, width)
        self.t_embedder = NumberEmbedder(width)
        self.c_embedder = nn.Module()
        self.c_embedder.linear_1, self.c_embedder.linear_2 = nn.Linear(text, width), nn.Linear(width, width)
        self.individual_token_refiner = nn.Module()
        self.individual_token_refiner.blocks = nn.ModuleList([RefinerBlock(width, inner) for _ in range(2)])

    def forward(self, states: Tensor, t: Tensor, mask: Tensor) -> Tensor:
        m = mask.float()[..., None]
        mean = (states * m).sum(1) / m.sum(1)
        c = self.t_embedder(t) + self.c_embedder.linear_2(F.silu(self.c_embedder.linear_1(mean)))
        x = self.input_embedder(states)
        sees = mask.bool()[:, None, :, None] & mask.bool()[:, None, None, :]
        sees = sees.clone()
        sees[..., 0] = True
        for b in self.individual_token_refiner.blocks:
            gate1, gate2 = b.adaLN_modulation(c).chunk(2, -1)
            q, k, v = b.self_attn_qkv(b.norm1(x)).chunk(3, -1)
            x = x + gate1[:, None] * b.self_attn_proj(attend(q, k, v, self.heads, sees))
            x = x + gate2[:, None] * b.mlp.fc2(F.silu(b.mlp.fc1(b.norm2(x))))
        return x


class AudioAdapter(nn.Module):
    def __init__(self, width: int, adapter: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q, self.to_kv = nn.Linear(width, adapter, bias=False), nn.Linear(width, 2 * adapter, bias=False)
        self.to_out = nn.Linear(adapter, width, bias=False)

    def forward(self, audio: Tensor, img: Tensor) -> Tensor:
        k, v = self.to_kv(self.norm1(audio)).chunk(2, -1)
        return self.to_out(attend(self.to_q(self.norm2(img)), k, v, 1))


class Transformer(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        self.c = c
        width, heads, inner = c["hidden_size"], c["num_heads"], 4 * c["hidden_size"]
        latent = c["in_channels"]
        self.img_in, self.ref_in = nn.Module(), nn.Module()
        for part in (self.img_in, self.ref_in):
            part.proj = nn.Conv3d(latent, width, (1, 2, 2), (1, 2, 2))
        self.before_proj = nn.Linear(width, width)
        self.time_in, self.fps_proj = NumberEmbedder(width), NumberEmbedder(width)
        self.motion_exp, self.motion_pose = NumberEmbedder(width // 4), NumberEmbedder(width // 4)
        self.vector_in = nn.Module()
        self.vector_in.in_layer, self.vector_in.out_layer = nn.Linear(c["text_states_dim_2"], width), nn.Linear(width, width)
        self.txt_in = Refiner(c["text_states_dim"], width, heads, inner)
        self.double_blocks = nn.ModuleList([DoubleBlock(width, heads, inner) for _ in range(c["depth_double_blocks"])])
        self.single_blocks = nn.ModuleList([SingleBlock(width, heads, inner) for _ in range(c["depth_single_blocks"])])
        self.audio_proj = nn.Module()
        a = self.audio_proj
        a.proj1, a.proj2 = nn.Linear(c["audio_values"], c["audio_inner"]), nn.Linear(c["audio_inner"], c["audio_inner"])
        a.proj3, a.norm = nn.Linear(c["audio_inner"], 4 * width), nn.LayerNorm(width)
        self.audio_adapter_blocks = nn.ModuleList([AudioAdapter(width, c["adapter"]) for _ in c["audio_double_blocks"]])
        self.final_layer = nn.Module()
        self.final_layer.linear = nn.Linear(width, 4 * latent)
        self.final_layer.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def start(self):
        """Values to train from: modulation and output zero, so that every block begins as nothing."""
        for name, p in self.named_parameters():
            if "_mod.linear" in name or "modulation.linear" in name or "adaLN_modulation" in name or "final_layer" in name:
                nn.init.zeros_(p)

    def forward(self, x, t, text, text_mask, pooled, ref, audio, face_mask, fps=None, motion_exp=None, motion_pose=None):
        """Velocities (B, C, T, h, w).

        x, ref (B, C, T, h, w); t (B) in 0..1000; text (B, L, width) with text_mask (B, L), whose sum is the number of
        valid rows; pooled (B, width); audio (B, 4T-3, window, states, channels); face_mask (B, 1, 1, h, w).
        """
        b, latent, frames, h, w = x.shape
        width, reference = self.c["hidden_size"], h // 2 * (w // 2)
        number = lambda value, n: x.new_full((b, n), value)  # noqa: E731
        fps = x.new_full((b,), 25.0) if fps is None else fps
        motion_exp = number(30.0, 4) if motion_exp is None else motion_exp
        motion_pose = number(25.0, 4) if motion_pose is None else motion_pose
        vec = self.time_in(t) + self.motion_exp(motion_exp).flatten(1) + self.motion_pose(motion_pose).flatten(1)
        vec = vec + self.fps_proj(fps) + self.vector_in.out_layer(F.silu(self.vector_in.in_layer(pooled)))
        tokens = lambda part, z: part.proj(z).flatten(2).transpose(1, 2)  # noqa: E731
        added = self.before_proj(tokens(self.ref_in, ref))
        img = torch.cat([tokens(self.img_in, ref[:, :, :1]), added + tokens(self.img_in, x)], 1)
        txt = self.txt_in(text, t, text_mask)
        valid = text_mask.sum(1)
        longest = int(valid.max())
        txt = txt[:, :longest]
        mask = None
        if int(valid.min()) < longest:
            seen = torch.arange(longest)[None] < valid[:, None]
            mask = torch.cat([seen.new_ones(b, img.shape[1]), seen], 1)[:, None, None]
        turn = rope(frames, h // 2, w // 2, self.c["rope_dim_list"], self.c["rope_theta"])
        a = self.audio_proj
        heard = a.proj3(F.relu(a.proj2(F.relu(a.proj1(audio.flatten(2))))))
        heard = a.norm(heard.unflatten(-1, (4, width)))  # (B, 4T-3, 4, H)
        heard = torch.cat([heard[:, :1].expand(-1, 3, -1, -1), heard], 1).reshape(b, frames, 16, width)
        gate = face_mask[:, 0, 0, ::2, ::2].reshape(b, 1, reference, 1)
        for i, block in enumerate(self.double_blocks):
            img, txt = block(img, txt, vec, turn, mask)
            if i in self.c["audio_double_blocks"]:
                adapter = self.audio_adapter_blocks[self.c["audio_double_blocks"].index(i)]
                moving = img[:, reference:].unflatten(1, (frames, reference))
                change = (gate * adapter(heard, moving)).flatten(1, 2)
                img = torch.cat([img[:, :reference], img[:, reference:] + change], 1)
        joint = torch.cat([img, txt], 1)
        for block in self.single_blocks:
            joint = block(joint, vec, turn, mask)
        shift, scale = self.final_layer.adaLN_modulation(vec).chunk(2, -1)
        y = self.final_layer.linear(modulate(joint[:, reference : img.shape[1]], shift, scale))
        y = y.view(b, frames, h // 2, w // 2, latent, 2, 2).permute(0, 4, 1, 2, 5, 3, 6)
        return y.reshape(b, latent, frames, h, w)
