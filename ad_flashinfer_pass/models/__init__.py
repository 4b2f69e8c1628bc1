"""Where models come from: HF directories and ids, config.json alone, and the demo."""
