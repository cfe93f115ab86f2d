//! Models known by name: the real tensors of real checkpoints, in the checkpoints' order.

use param_averager::Dtype;

use crate::layout::{Layout, Tensor};

/// Name and shape.
type Entry = (String, Vec<u64>);

fn layout(name: &str, dtype: Dtype, list: Vec<Entry>) -> Layout {
    let tensor = |(name, shape)| Tensor { name, shape, dtype };
    Layout::new(name, list.into_iter().map(tensor).collect())
}

fn with_bias(name: &str, shape: &[u64], bias: u64) -> [Entry; 2] {
    [(format!("{name}.weight"), shape.to_vec()), (format!("{name}.bias"), vec![bias])]
}

/// GPT-2 124M as `openai-community/gpt2` has it: linear layers are inputs × outputs, the head is
/// tied to `wte`.
pub fn gpt2() -> Layout {
    const D: u64 = 768;
    let mut list =
        vec![("wte.weight".to_string(), vec![50257, D]), ("wpe.weight".to_string(), vec![1024, D])];
    for block in 0..12 {
        for (name, shape) in [
            ("ln_1", &[D][..]),
            ("attn.c_attn", &[D, 3 * D]),
            ("attn.c_proj", &[D, D]),
            ("ln_2", &[D]),
            ("mlp.c_fc", &[D, 4 * D]),
            ("mlp.c_proj", &[4 * D, D]),
        ] {
            list.extend(with_bias(&format!("h.{block}.{name}"), shape, shape[shape.len() - 1]));
        }
    }
    list.extend(with_bias("ln_f", &[D], D));
    layout("gpt2", Dtype::F32, list)
}

/// ResNet-50 as torchvision's `resnet50().parameters()`: batch norm's running statistics are
/// buffers, not parameters.
pub fn resnet50() -> Layout {
    let mut list = vec![];
    let mut conv = |name: &str, norm: &str, outputs: u64, inputs: u64, kernel: u64| {
        list.push((format!("{name}.weight"), vec![outputs, inputs, kernel, kernel]));
        list.extend(with_bias(norm, &[outputs], outputs));
    };
    conv("conv1", "bn1", 64, 3, 7);
    let mut inputs = 64;
    for (stage, (blocks, width)) in [(3, 64), (4, 128), (6, 256), (3, 512)].into_iter().enumerate()
    {
        for block in 0..blocks {
            let of = |name: &str| format!("layer{}.{block}.{name}", stage + 1);
            conv(&of("conv1"), &of("bn1"), width, inputs, 1);
            conv(&of("conv2"), &of("bn2"), width, width, 3);
            conv(&of("conv3"), &of("bn3"), 4 * width, width, 1);
            if block == 0 {
                conv(&of("downsample.0"), &of("downsample.1"), 4 * width, inputs, 1);
            }
            inputs = 4 * width;
        }
    }
    list.extend(with_bias("fc", &[1000, 2048], 1000));
    layout("resnet50", Dtype::F32, list)
}

/// Llama 3 8B as `meta-llama/Meta-Llama-3-8B` has it: 8 key-value heads of 128, head not tied.
pub fn llama3_8b() -> Layout {
    const D: u64 = 4096;
    let (keys, hidden, words) = (1024, 14336, 128_256);
    let mut list = vec![("model.embed_tokens.weight".to_string(), vec![words, D])];
    for layer in 0..32 {
        for (name, shape) in [
            ("self_attn.q_proj", &[D, D][..]),
            ("self_attn.k_proj", &[keys, D]),
            ("self_attn.v_proj", &[keys, D]),
            ("self_attn.o_proj", &[D, D]),
            ("mlp.gate_proj", &[hidden, D]),
            ("mlp.up_proj", &[hidden, D]),
            ("mlp.down_proj", &[D, hidden]),
            ("input_layernorm", &[D]),
            ("post_attention_layernorm", &[D]),
        ] {
            list.push((format!("model.layers.{layer}.{name}.weight"), shape.to_vec()));
        }
    }
    list.push(("model.norm.weight".into(), vec![D]));
    list.push(("lm_head.weight".into(), vec![words, D]));
    layout("llama3-8b", Dtype::Bf16, list)
}
