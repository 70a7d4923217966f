"""The model and the trainer that consume a converted checkpoint.  May import dsv4ckpt; empty in version 0.1."""
