"""Training by several processes that torchrun has started: what differs from one process. processes.py: who they are
and how they agree; sharding.py: DDP and FSDP; orthogonalizing.py: Muon's work, divided; launch.py: their start and end.
With one process all of it is the identity."""
