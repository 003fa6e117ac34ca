"""What the watch looks for: one detector an idea, over one history, with thresholds that cite their evidence."""
