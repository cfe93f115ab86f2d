//! Layouts that the benches average.

/// Name and numbers of elements of each layout: many tensors, one tensor of the same size, and many
/// small tensors.
pub fn layouts() -> [(&'static str, Vec<usize>); 3] {
    [("gpt2", gpt2()), ("gpt2_as_one", vec![gpt2().iter().sum()]), ("100x1000", vec![1000; 100])]
}

/// Numbers of elements of GPT-2's 148 tensors.
fn gpt2() -> Vec<usize> {
    const D: usize = 768;
    let block = [D, D, D * 3 * D, 3 * D, D * D, D, D, D, D * 4 * D, 4 * D, 4 * D * D, D];
    let mut layout = vec![50257 * D, 1024 * D];
    (0..12).for_each(|_| layout.extend(block));
    layout.extend([D, D]);
    layout
}
