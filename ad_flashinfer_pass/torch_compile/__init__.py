"""The door of ``torch.compile``: the backend, the session, and how a graph from Dynamo is read and run."""
