raise SystemExit('moved to tools/analysis_tools/benchmark.py')
