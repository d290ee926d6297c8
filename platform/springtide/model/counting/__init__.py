"""Models that count: each is fitted in seconds with numpy and scipy alone and scores the whole catalogue."""
