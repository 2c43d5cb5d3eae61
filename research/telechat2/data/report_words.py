"""The words of the report page, in the languages of the two READMEs."""

LANGUAGES = ("en", "zh")

# English -> Chinese; an English page has the keys
_CHINESE = {
    "Training data": "训练数据",
    "Result": "结果",
    "Inputs": "输入文件",
    "Formats": "数据格式",
    "Skipped lines": "跳过的行",
    "Fields that are not used": "未使用的字段",
    "Tokens in the records": "记录中的token",
    "Lengths": "长度分布",
    "Conversations and texts, by tokens, up to": "对话和文本，按token数，不超过",
    "Samples": "样例",
    "Trained tokens are": "参与训练的token为",
    "green": "绿色",
    "special ones": "特殊token为",
    "violet": "紫色",
    "none": "无",
    "file": "文件",
    "bytes": "字节",
    "weight": "权重",
    "reason": "原因",
    "lines": "行数",
    "share": "占比",
    "first": "最先出现",
    "field": "字段",
    "trained": "参与训练",
    "not trained": "不参与训练",
    "repeated at splits": "切分处重复",
    "padding": "填充",
    "lines read": "读取的行",
    "lines skipped": "跳过的行",
    "conversations": "对话",
    "texts": "预训练文本",
    "further copies, by the weights of the files": "按文件权重增加的副本",
    "cut at a turn border to fit a record": "在轮次边界处截断",
    "conversations whose turns do not alternate": "轮次不交替的对话",
    "with text that the vocabulary changes for good": "含有被词表改变的文本",
    "with special-token text (such as <_end>), encoded as text": "含有特殊token字样（如<_end>），按文本编码",
    "records": "记录",
    "tokens of a record": "每条记录的token数",
    "tokens": "token",
    "prompt format": "提示格式",
    "tokens more": "个token未显示",
    "line": "行",
    "item": "项",
    "blank line": "空行",
    "left out by the weight of its file": "按文件权重未选中",
    "left out by its own weight of 0": "自身权重为0",
    "not valid Unicode: half of a surrogate pair": "不是有效的Unicode：半个代理对",
    "without an answer to train on": "没有可训练的回答",
    "not UTF-8": "不是UTF-8",
    "not JSON": "不是JSON",
    "of no known format": "格式未知",
    "not what its format asks for": "不符合其格式的要求",
    "marked as not to be learnt": "标记为不可学习",
}
_BEGINNINGS = {
    "with a field that is not used: ": "含有未使用的字段：",
    "longer than a record of ": "比一条记录长：",
}
_ENDINGS = {" tokens": "个token", " within its first trained turn": "，第一个参与训练的轮次也放不下"}


def in_language(english: str, language: str) -> str:
    """``english`` in a language; a reason that names values keeps them."""
    if language == "en":
        return english
    for beginning, chinese in _BEGINNINGS.items():
        if english.startswith(beginning):
            rest = english.removeprefix(beginning)
            for ending, chinese_ending in _ENDINGS.items():
                rest = rest.replace(ending, chinese_ending)
            return chinese + rest
    return _CHINESE.get(english, english)
