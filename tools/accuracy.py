raise SystemExit('moved to tools/analysis_tools/accuracy.py')
