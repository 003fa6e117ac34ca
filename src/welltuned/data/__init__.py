"""From a file to token ids and loss masks: source, conversation, render, audit, packing, stream."""
