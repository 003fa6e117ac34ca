import copy
import pickle

from welltuned.data.conversation import Conversation, Defect, Kind, Message, Policy

PAIR = (Message("user", "q"), Message("assistant", "a"))


def test_prompt_groups_by_the_turns_before_the_first_answer():
    one = Conversation(PAIR, "x:1")
    two = Conversation((*one.messages, Message("user", "r"), Message("assistant", "b")), "x:2")
    assert one.prompt() == two.prompt() == (("user", "q"),)


def test_prompt_of_a_document_is_the_document():
    one, two = (Conversation((Message("document", text),), "x:1") for text in ("one", "two"))
    assert one.prompt() != two.prompt()


def test_messages_without_extra_fields_share_one_dict():
    one, two = Message("user", "q"), Message("user", "r")
    assert one.extra is two.extra
    assert one.extra == {}


def test_the_template_sees_the_extra_fields_and_not_the_mark():
    message = Message("assistant", "a", {"name": "n"}, trained=False)
    assert message.to_template() == {"name": "n", "role": "assistant", "content": "a"}


def test_conversations_can_be_copied_and_sent_to_another_process():
    conversation = Conversation(PAIR, "x:1", tools=({"type": "function"},), group="g")
    assert pickle.loads(pickle.dumps(conversation)) == copy.deepcopy(conversation) == conversation


def test_a_defect_is_a_bad_row_unless_it_says_more():
    assert Defect("x:1", "why").kind is Kind.BAD_ROW
    assert [policy.value for policy in Policy] == ["error", "drop", "keep"]
