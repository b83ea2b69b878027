//! Who may talk to whom, in real namespaces (reference, dataplane §6 and §12.4 `test_policy`; craft-and-trust D9, D12–D14, D16).

mod ground;
mod live;
mod refusal;
mod reload;
mod scope;
mod strict;
