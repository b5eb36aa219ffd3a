//! Every path of a GPU, run on the model of CUDA in tests/fake_cuda: real programs, the real libtorch_cuda.so, no GPU.

mod abi;
mod check;
mod counts;
mod faults;
mod machine;
mod model;
