//! Models known by name: the real tensors of real checkpoints, in the checkpoints' order.

use param_averager::Dtype;

use crate::layout::{Layout, Tensor};

struct Tensors {
    dtype: Dtype,
    list: Vec<Tensor>,
}

impl Tensors {
    fn new(dtype: Dtype) -> Self {
        Tensors { dtype, list: vec![] }
    }

    fn add(&mut self, name: impl Into<String>, shape: &[u64]) {
        self.list.push(Tensor { name: name.into(), shape: shape.to_vec(), dtype: self.dtype });
    }

    fn add_with_bias(&mut self, name: &str, shape: &[u64], bias: u64) {
        self.add(format!("{name}.weight"), shape);
        self.add(format!("{name}.bias"), &[bias]);
    }
}

/// GPT-2 124M as `openai-community/gpt2` has it: linear layers are inputs × outputs, the head is
/// tied to `wte`.
pub fn gpt2() -> Layout {
    let width = 768;
    let mut tensors = Tensors::new(Dtype::F32);
    tensors.add("wte.weight", &[50257, width]);
    tensors.add("wpe.weight", &[1024, width]);
    for block in 0..12 {
        let mut add = |name: &str, shape: &[u64]| {
            tensors.add_with_bias(&format!("h.{block}.{name}"), shape, shape[shape.len() - 1]);
        };
        add("ln_1", &[width]);
        add("attn.c_attn", &[width, 3 * width]);
        add("attn.c_proj", &[width, width]);
        add("ln_2", &[width]);
        add("mlp.c_fc", &[width, 4 * width]);
        add("mlp.c_proj", &[4 * width, width]);
    }
    tensors.add_with_bias("ln_f", &[width], width);
    Layout::new("gpt2", tensors.list)
}

/// ResNet-50 as torchvision's `resnet50().parameters()`: batch norm's running statistics are
/// buffers, not parameters.
pub fn resnet50() -> Layout {
    let mut tensors = Tensors::new(Dtype::F32);
    let mut conv = |name: &str, norm: &str, outputs: u64, inputs: u64, kernel: u64| {
        tensors.add(format!("{name}.weight"), &[outputs, inputs, kernel, kernel]);
        tensors.add_with_bias(norm, &[outputs], outputs);
    };
    conv("conv1", "bn1", 64, 3, 7);
    let mut inputs = 64;
    for (stage, (blocks, width)) in [(3, 64), (4, 128), (6, 256), (3, 512)].into_iter().enumerate()
    {
        for block in 0..blocks {
            let at = format!("layer{}.{block}", stage + 1);
            conv(&format!("{at}.conv1"), &format!("{at}.bn1"), width, inputs, 1);
            conv(&format!("{at}.conv2"), &format!("{at}.bn2"), width, width, 3);
            conv(&format!("{at}.conv3"), &format!("{at}.bn3"), 4 * width, width, 1);
            if block == 0 {
                conv(
                    &format!("{at}.downsample.0"),
                    &format!("{at}.downsample.1"),
                    4 * width,
                    inputs,
                    1,
                );
            }
            inputs = 4 * width;
        }
    }
    tensors.add_with_bias("fc", &[1000, 2048], 1000);
    Layout::new("resnet50", tensors.list)
}

/// Llama 3 8B as `meta-llama/Meta-Llama-3-8B` has it: 8 key-value heads of 128, head not tied.
pub fn llama3_8b() -> Layout {
    let (width, keys, hidden, words) = (4096, 1024, 14336, 128_256);
    let mut tensors = Tensors::new(Dtype::Bf16);
    tensors.add("model.embed_tokens.weight", &[words, width]);
    for layer in 0..32 {
        let mut add = |name: &str, shape: &[u64]| {
            tensors.add(format!("model.layers.{layer}.{name}.weight"), shape)
        };
        add("self_attn.q_proj", &[width, width]);
        add("self_attn.k_proj", &[keys, width]);
        add("self_attn.v_proj", &[keys, width]);
        add("self_attn.o_proj", &[width, width]);
        add("mlp.gate_proj", &[hidden, width]);
        add("mlp.up_proj", &[hidden, width]);
        add("mlp.down_proj", &[width, hidden]);
        add("input_layernorm", &[width]);
        add("post_attention_layernorm", &[width]);
    }
    tensors.add("model.norm.weight", &[width]);
    tensors.add("lm_head.weight", &[words, width]);
    Layout::new("llama3-8b", tensors.list)
}
