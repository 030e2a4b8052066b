"""`make chaos`: faults under load on real servers, judged by what senders wrote down after they were acknowledged."""
