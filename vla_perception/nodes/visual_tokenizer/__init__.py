"""Node `visual_tokenizer`: camera topics in, one topic of visual tokens out."""
