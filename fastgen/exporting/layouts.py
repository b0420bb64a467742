"""Where a tensor of a diffusers transformer lies in the layout of the network's authors, which other programs read.

diffusers renamed layers and split fused ones. `Layout.place` gives the way back: the name in the original layout,
which rows of that tensor these are, and whether the halves of its rows change places (diffusers'
AdaLayerNormContinuous takes scale and shift in the other order). The tables are the inverses of diffusers' own
converters, `convert_*_to_diffusers` of `loaders/single_file_utils.py`, with which the tests compare them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# A line is: diffusers' name, the original name, and what else there is to know. `#` stands for the number of a block
# and `*` for the rest of the name. 1/3: these rows are the second of three parts. swap: the halves change places.
SD3 = """
pos_embed.pos_embed                            pos_embed
pos_embed.proj.*                               x_embedder.proj.*
time_text_embed.timestep_embedder.linear_1.*   t_embedder.mlp.0.*
time_text_embed.timestep_embedder.linear_2.*   t_embedder.mlp.2.*
time_text_embed.text_embedder.linear_1.*       y_embedder.mlp.0.*
time_text_embed.text_embedder.linear_2.*       y_embedder.mlp.2.*
context_embedder.*                             context_embedder.*
transformer_blocks.#.attn.to_q.*               joint_blocks.#.x_block.attn.qkv.*        0/3
transformer_blocks.#.attn.to_k.*               joint_blocks.#.x_block.attn.qkv.*        1/3
transformer_blocks.#.attn.to_v.*               joint_blocks.#.x_block.attn.qkv.*        2/3
transformer_blocks.#.attn.add_q_proj.*         joint_blocks.#.context_block.attn.qkv.*  0/3
transformer_blocks.#.attn.add_k_proj.*         joint_blocks.#.context_block.attn.qkv.*  1/3
transformer_blocks.#.attn.add_v_proj.*         joint_blocks.#.context_block.attn.qkv.*  2/3
transformer_blocks.#.attn.norm_q.*             joint_blocks.#.x_block.attn.ln_q.*
transformer_blocks.#.attn.norm_k.*             joint_blocks.#.x_block.attn.ln_k.*
transformer_blocks.#.attn.norm_added_q.*       joint_blocks.#.context_block.attn.ln_q.*
transformer_blocks.#.attn.norm_added_k.*       joint_blocks.#.context_block.attn.ln_k.*
transformer_blocks.#.attn.to_out.0.*           joint_blocks.#.x_block.attn.proj.*
transformer_blocks.#.attn.to_add_out.*         joint_blocks.#.context_block.attn.proj.*
transformer_blocks.#.attn2.to_q.*              joint_blocks.#.x_block.attn2.qkv.*       0/3
transformer_blocks.#.attn2.to_k.*              joint_blocks.#.x_block.attn2.qkv.*       1/3
transformer_blocks.#.attn2.to_v.*              joint_blocks.#.x_block.attn2.qkv.*       2/3
transformer_blocks.#.attn2.norm_q.*            joint_blocks.#.x_block.attn2.ln_q.*
transformer_blocks.#.attn2.norm_k.*            joint_blocks.#.x_block.attn2.ln_k.*
transformer_blocks.#.attn2.to_out.0.*          joint_blocks.#.x_block.attn2.proj.*
transformer_blocks.#.norm1.linear.*            joint_blocks.#.x_block.adaLN_modulation.1.*
transformer_blocks.#.norm1_context.linear.*    joint_blocks.#.context_block.adaLN_modulation.1.*
transformer_blocks.#.ff.net.0.proj.*           joint_blocks.#.x_block.mlp.fc1.*
transformer_blocks.#.ff.net.2.*                joint_blocks.#.x_block.mlp.fc2.*
transformer_blocks.#.ff_context.net.0.proj.*   joint_blocks.#.context_block.mlp.fc1.*
transformer_blocks.#.ff_context.net.2.*        joint_blocks.#.context_block.mlp.fc2.*
norm_out.linear.*                              final_layer.adaLN_modulation.1.*         swap
proj_out.*                                     final_layer.linear.*
"""

FLUX = """
time_text_embed.timestep_embedder.linear_1.*   time_in.in_layer.*
time_text_embed.timestep_embedder.linear_2.*   time_in.out_layer.*
time_text_embed.text_embedder.linear_1.*       vector_in.in_layer.*
time_text_embed.text_embedder.linear_2.*       vector_in.out_layer.*
time_text_embed.guidance_embedder.linear_1.*   guidance_in.in_layer.*
time_text_embed.guidance_embedder.linear_2.*   guidance_in.out_layer.*
context_embedder.*                             txt_in.*
x_embedder.*                                   img_in.*
transformer_blocks.#.norm1.linear.*            double_blocks.#.img_mod.lin.*
transformer_blocks.#.norm1_context.linear.*    double_blocks.#.txt_mod.lin.*
transformer_blocks.#.attn.to_q.*               double_blocks.#.img_attn.qkv.*           0/3
transformer_blocks.#.attn.to_k.*               double_blocks.#.img_attn.qkv.*           1/3
transformer_blocks.#.attn.to_v.*               double_blocks.#.img_attn.qkv.*           2/3
transformer_blocks.#.attn.add_q_proj.*         double_blocks.#.txt_attn.qkv.*           0/3
transformer_blocks.#.attn.add_k_proj.*         double_blocks.#.txt_attn.qkv.*           1/3
transformer_blocks.#.attn.add_v_proj.*         double_blocks.#.txt_attn.qkv.*           2/3
transformer_blocks.#.attn.norm_q.weight        double_blocks.#.img_attn.norm.query_norm.scale
transformer_blocks.#.attn.norm_k.weight        double_blocks.#.img_attn.norm.key_norm.scale
transformer_blocks.#.attn.norm_added_q.weight  double_blocks.#.txt_attn.norm.query_norm.scale
transformer_blocks.#.attn.norm_added_k.weight  double_blocks.#.txt_attn.norm.key_norm.scale
transformer_blocks.#.ff.net.0.proj.*           double_blocks.#.img_mlp.0.*
transformer_blocks.#.ff.net.2.*                double_blocks.#.img_mlp.2.*
transformer_blocks.#.ff_context.net.0.proj.*   double_blocks.#.txt_mlp.0.*
transformer_blocks.#.ff_context.net.2.*        double_blocks.#.txt_mlp.2.*
transformer_blocks.#.attn.to_out.0.*           double_blocks.#.img_attn.proj.*
transformer_blocks.#.attn.to_add_out.*         double_blocks.#.txt_attn.proj.*
single_transformer_blocks.#.norm.linear.*      single_blocks.#.modulation.lin.*
single_transformer_blocks.#.attn.to_q.*        single_blocks.#.linear1.*                0/4
single_transformer_blocks.#.attn.to_k.*        single_blocks.#.linear1.*                1/4
single_transformer_blocks.#.attn.to_v.*        single_blocks.#.linear1.*                2/4
single_transformer_blocks.#.proj_mlp.*         single_blocks.#.linear1.*                3/4
single_transformer_blocks.#.attn.norm_q.weight single_blocks.#.norm.query_norm.scale
single_transformer_blocks.#.attn.norm_k.weight single_blocks.#.norm.key_norm.scale
single_transformer_blocks.#.proj_out.*         single_blocks.#.linear2.*
norm_out.linear.*                              final_layer.adaLN_modulation.1.*         swap
proj_out.*                                     final_layer.linear.*
"""

FLUX2 = """
time_guidance_embed.timestep_embedder.linear_1.*   time_in.in_layer.*
time_guidance_embed.timestep_embedder.linear_2.*   time_in.out_layer.*
time_guidance_embed.guidance_embedder.linear_1.*   guidance_in.in_layer.*
time_guidance_embed.guidance_embedder.linear_2.*   guidance_in.out_layer.*
context_embedder.*                                 txt_in.*
x_embedder.*                                       img_in.*
double_stream_modulation_img.linear.*              double_stream_modulation_img.lin.*
double_stream_modulation_txt.linear.*              double_stream_modulation_txt.lin.*
single_stream_modulation.linear.*                  single_stream_modulation.lin.*
transformer_blocks.#.ff.linear_in.*                double_blocks.#.img_mlp.0.*
transformer_blocks.#.ff.linear_out.*               double_blocks.#.img_mlp.2.*
transformer_blocks.#.ff_context.linear_in.*        double_blocks.#.txt_mlp.0.*
transformer_blocks.#.ff_context.linear_out.*       double_blocks.#.txt_mlp.2.*
single_transformer_blocks.#.attn.to_qkv_mlp_proj.* single_blocks.#.linear1.*
single_transformer_blocks.#.attn.to_out.*          single_blocks.#.linear2.*
"""  # and, as in FLUX.1, the attention of the blocks and the end

Z_IMAGE = "\n".join(
    [
        "all_x_embedder.2-1.* x_embedder.*",
        "all_final_layer.2-1.* final_layer.*",
        *(
            f"{part}.#.attention.{own} {part}.#.attention.{theirs}"
            for part in ("layers", "noise_refiner", "context_refiner")
            for own, theirs in (
                *(("to_q.*", "qkv.* 0/3"), ("to_k.*", "qkv.* 1/3"), ("to_v.*", "qkv.* 2/3")),
                *(("to_out.0.*", "out.*"), ("norm_q.*", "q_norm.*"), ("norm_k.*", "k_norm.*")),
            )
        ),
        "* *",
    ]
)

WAN = """
patch_embedding.*                                  patch_embedding.*
condition_embedder.time_embedder.linear_1.*        time_embedding.0.*
condition_embedder.time_embedder.linear_2.*        time_embedding.2.*
condition_embedder.time_proj.*                     time_projection.1.*
condition_embedder.text_embedder.linear_1.*        text_embedding.0.*
condition_embedder.text_embedder.linear_2.*        text_embedding.2.*
condition_embedder.image_embedder.norm1.*          img_emb.proj.0.*
condition_embedder.image_embedder.ff.net.0.proj.*  img_emb.proj.1.*
condition_embedder.image_embedder.ff.net.2.*       img_emb.proj.3.*
condition_embedder.image_embedder.norm2.*          img_emb.proj.4.*
blocks.#.attn1.to_q.*                              blocks.#.self_attn.q.*
blocks.#.attn1.to_k.*                              blocks.#.self_attn.k.*
blocks.#.attn1.to_v.*                              blocks.#.self_attn.v.*
blocks.#.attn1.to_out.0.*                          blocks.#.self_attn.o.*
blocks.#.attn1.norm_q.*                            blocks.#.self_attn.norm_q.*
blocks.#.attn1.norm_k.*                            blocks.#.self_attn.norm_k.*
blocks.#.attn2.to_q.*                              blocks.#.cross_attn.q.*
blocks.#.attn2.to_k.*                              blocks.#.cross_attn.k.*
blocks.#.attn2.to_v.*                              blocks.#.cross_attn.v.*
blocks.#.attn2.to_out.0.*                          blocks.#.cross_attn.o.*
blocks.#.attn2.norm_q.*                            blocks.#.cross_attn.norm_q.*
blocks.#.attn2.norm_k.*                            blocks.#.cross_attn.norm_k.*
blocks.#.attn2.add_k_proj.*                        blocks.#.cross_attn.k_img.*
blocks.#.attn2.add_v_proj.*                        blocks.#.cross_attn.v_img.*
blocks.#.attn2.norm_added_k.*                      blocks.#.cross_attn.norm_k_img.*
blocks.#.norm2.*                                   blocks.#.norm3.*
blocks.#.ffn.net.0.proj.*                          blocks.#.ffn.0.*
blocks.#.ffn.net.2.*                               blocks.#.ffn.2.*
blocks.#.scale_shift_table                         blocks.#.modulation
scale_shift_table                                  head.modulation
proj_out.*                                         head.head.*
"""

QWEN_IMAGE = "* *"  # diffusers has the authors' names


@dataclass(frozen=True)
class Place:
    """name: in the original layout. part, parts: these are the rows of part number `part` of so many. swapped: the
    second half of the rows comes first there."""

    name: str
    part: int = 0
    parts: int = 1
    swapped: bool = False


@dataclass(frozen=True)
class Rule:
    """A line of a table. pattern: matches diffusers' name. original: has \\1, \\2 for what `#` and `*` stood for."""

    pattern: re.Pattern[str]
    original: str
    part: int = 0
    parts: int = 1
    swapped: bool = False


class Layout:
    """The rules of one network. table: as above."""

    def __init__(self, table: str):
        self.rules = [parse_rule(line) for line in table.splitlines() if line.strip()]

    def place(self, name: str) -> Place:
        """Raises ValueError for a tensor that the original layout has no place for."""
        for rule in self.rules:
            if found := rule.pattern.fullmatch(name):
                return Place(found.expand(rule.original), rule.part, rule.parts, rule.swapped)
        raise ValueError(f"the original layout of this network has no place for {name}")


def parse_rule(line: str) -> Rule:
    name, original, *more = line.split()
    pattern = re.escape(name).replace(r"\#", r"(\d+)").replace(r"\*", "(.+)")
    count = iter(range(1, 9))
    expanded = re.sub(r"[#*]", lambda _: rf"\{next(count)}", original)
    if more == ["swap"]:
        return Rule(re.compile(pattern), expanded, swapped=True)
    part, parts = map(int, more[0].split("/")) if more else (0, 1)
    return Rule(re.compile(pattern), expanded, part, parts)


def original_layout(network: Mapping[str, Any]) -> Layout:
    """The original layout of a diffusers network with this config.json. Raises ValueError if none is known."""
    name = str(network.get("_class_name"))
    if name == "SD3Transformer2DModel":
        last = network["num_layers"] - 1  # whose text stream ends in an AdaLayerNormContinuous
        rule = (
            f"transformer_blocks.{last}.norm1_context.linear.* joint_blocks.{last}.context_block.adaLN_modulation.1.*"
        )
        return Layout(f"{rule} swap\n{SD3}")
    tables = {
        "FluxTransformer2DModel": FLUX,
        "Flux2Transformer2DModel": FLUX2 + FLUX,
        "ZImageTransformer2DModel": Z_IMAGE,
        "WanTransformer3DModel": WAN,
        "QwenImageTransformer2DModel": QWEN_IMAGE,
    }
    if name not in tables:
        known = ", ".join(["SD3Transformer2DModel", *tables])
        raise ValueError(f"no other key layout is known for a {name}; known are those of {known}")
    return Layout(tables[name])
