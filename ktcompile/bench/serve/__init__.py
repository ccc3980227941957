"""Load for servers with OpenAI's interface: what is sent when, what came back when, and what follows from it."""
