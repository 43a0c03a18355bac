raise SystemExit('moved to tools/analysis_tools/results.py')
