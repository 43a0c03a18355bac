# The narrow detector on handwritten digits in photographs, which tools/make_digits.py writes.
# Digits are not mirrored; all else is as on shapes.
_base_ = 'faster-rcnn_r18_fpn_shapes_narrow.py'

data_root = 'data/digits/'
classes = ('0', '1', '2', '3', '4', '5', '6', '7', '8', '9')
metainfo = dict(
    classes=classes,
    palette=[
        (31, 119, 180),
        (255, 127, 14),
        (44, 160, 44),
        (214, 39, 40),
        (148, 103, 189),
        (140, 86, 75),
        (227, 119, 194),
        (127, 127, 127),
        (188, 189, 34),
        (23, 190, 207),
    ],
)

model = dict(roi_head=dict(bbox_head=dict(num_classes=len(classes))))

_train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=(160, 160), keep_ratio=True),
    dict(type='PackDetInputs'),
]

train_dataloader = dict(
    dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=_train_pipeline)
)
val_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/val.json')
test_evaluator = val_evaluator
